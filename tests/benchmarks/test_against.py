"""The comparison with another engine, with sides that do no work."""

import json
import sys
from dataclasses import replace

import pytest

import benchmarks.against
from benchmarks.against import Side, SideFailed, Turns, compare, print_table, step_bytes
from benchmarks.machine import Roof
from benchmarks.peers.protocol import Setup, Work

WORK = Work(prefill=0, batch=1, context=64, tokens=32)
FAST = Setup("llama-3.2-1b", 1, 4, "fast", "f16", 1, "unused", WORK)
SIDE = (sys.executable, "tests.benchmarks.fake_side")


@pytest.fixture(autouse=True)
def _a_quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.against, "measure_roof", lambda _: Roof(1.0, 2.0, 100.0))
    monkeypatch.setattr(benchmarks.against, "wait_until_quiet", lambda _share, _limit: True)


def test_ratio_is_ours_over_the_peers(capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a ratio upside down, or of the wrong side's rates; a library's greeting read as an answer."""
    result = compare((*SIDE, FAST), (*SIDE, replace(FAST, variant="slow")), Turns(2, 0.0))
    assert result["ratio"] == 2.0
    assert result["pair_ratios"] == [2.0, 2.0]
    assert (result["ours"]["tok_per_s"], result["peer"]["tok_per_s"]) == (64.0, 32.0)
    assert json.loads(json.dumps(result)) == result
    print_table(result, sys.stdout)
    assert "ratio 2.00" in capsys.readouterr().out


def test_a_side_prepares_in_a_process_that_is_gone_when_memory_is_measured() -> None:
    """Bug: the memory that writing weights took, counted as the model's."""
    result = compare((*SIDE, FAST), (*SIDE, FAST), Turns(1, 0.0))
    first, second = (result[side]["settings"]["prepared"] for side in ("ours", "peer"))
    assert first != second
    assert result["ours"]["peak_rss_mib"] > 0


def test_a_refusal_ends_with_its_reason() -> None:
    """Bug: a format that one side does not have ends in a traceback of the other process."""
    with pytest.raises(SideFailed, match="odd is neither fast nor slow"):
        compare((*SIDE, FAST), (*SIDE, replace(FAST, variant="odd")), Turns(1, 0.0))


def test_a_side_that_dies_is_named() -> None:
    """Bug: waiting forever for the answer of a process that is gone."""
    with Side(sys.executable, "tests.no_such_module") as side, pytest.raises(SideFailed, match="no_such_module"):
        side.ask(FAST.to_line("prepare"))


def test_a_peer_that_is_not_installed_says_what_to_install() -> None:
    """Bug: an import error from another interpreter, with no word on what to do."""
    with pytest.raises(SideFailed, match=r"pip install llama-cpp-python gguf.*--peer-python"):
        benchmarks.against.check_peer("llama.cpp", "/bin/false")


def test_bytes_of_a_step() -> None:
    """Bug: a batch that reads its weights once for each sequence, or caches that are not counted."""
    facts = {"layer_bytes": 1000, "head_bytes": 100, "cache_bytes_per_token": 1}
    assert step_bytes(facts, WORK) == 1000 + 100 + 64 + 16
    assert step_bytes(facts, replace(WORK, batch=8)) == 1000 + 100 + 8 * (64 + 16)
    assert step_bytes(facts, Work(prefill=512, batch=1, context=0, tokens=0)) == 1000 + 100 + 256
