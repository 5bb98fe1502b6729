"""The speed that the start screen states."""

from pathlib import Path

import pytest
import torch

from engine import assembly
from engine.assembly import StartError, build, measure_decode
from engine.config import EngineConfig
from tests.engine.worlds import VOCAB, make_core


def test_measuring_leaves_the_engine_empty() -> None:
    core = make_core()
    assert measure_decode(core, core.parts.plan) > 0
    assert not core.has_work
    assert core.stats().pages_used == 0


def test_a_model_that_yields_nan_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a broken checkpoint that is reported as ready, with a speed."""
    monkeypatch.setattr("tests.engine.worlds.hash_logits", lambda context: torch.full((VOCAB,), torch.nan))
    core = make_core()
    with pytest.raises(StartError, match="cannot decode"):
        measure_decode(core, core.parts.plan)


def test_a_slow_model_is_not_made_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: ten steps of a model that takes seconds for each, before anyone may use it."""
    monkeypatch.setattr(assembly, "MEASURED_SECONDS", 0.0)
    core = make_core()
    assert measure_decode(core, core.parts.plan) > 0
    assert core.stats().steps_total == 1
    assert core.stats().pages_used == 0


def test_threads_that_cannot_be_started_end_in_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: --threads 100000 that ends in a traceback."""

    def refuse(num_threads: int) -> None:
        raise RuntimeError(f"cannot start {num_threads} threads: lower --threads")

    monkeypatch.setattr("engine.assembly.native.set_num_threads", refuse)
    demo = Path(__file__).parents[2] / "demo" / "checkpoint"
    with pytest.raises(StartError, match="cannot start 1 threads"):
        build(EngineConfig(str(demo), threads=1))
