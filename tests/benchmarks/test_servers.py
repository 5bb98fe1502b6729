"""The comparison with another server: its arithmetic without the peer, and its clients with our own server."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from benchmarks.against import SideFailed
from benchmarks.machine import Roof, cpu_seconds
from benchmarks.peers.nibble_server import write_tokenizer
from benchmarks.peers.protocol import Setup, Work
from benchmarks.servers import (
    MODEL,
    Contender,
    IdTarget,
    Load,
    Measured,
    Round,
    ask,
    check,
    find_program,
    llama_server,
    parse_version,
    peer_choices,
    print_table,
    prompts,
    ratios,
    report,
    started,
)
from server.bench.client import Outcome
from server.tokenizer import load_tokenizer

TICK_S = 0.01  # of the kernel's clocks of processes
ASKED = Load(num_requests=2, num_clients=2, prompt_tokens=4, output_tokens=3)
SETUP = Setup("llama-3.2-1b", None, 4, "", "f16", 2, "unused", Work(0, 8, 128, 128))
MEASURED = Measured(
    ours=[Round(60.0, 120.0, 1.0, 0.05), Round(40.0, 80.0, 2.0, 0.1)],
    peer=[Round(20.0, 40.0, 4.0, 0.2), Round(30.0, 60.0, 4.0, 0.2)],
    roofs=[Roof(1.0, 2.0, 100.0)] * 3,
    idle_share=0.0,
    others_share=[0.0, 0.2, 0.0, 0.0],
)


def test_ratios_are_ours_over_the_peers() -> None:
    """Bug: a ratio upside down, or extremes that mix rounds."""
    assert ratios(MEASURED, "output_tok_per_s") == {"ratio": 2.0, "min": 40 / 30, "max": 3.0, "pairs": [3.0, 40 / 30]}
    assert ratios(MEASURED, "ttft_p50_s")["ratio"] == 1.5 / 4


def test_a_report_says_which_turns_were_not_fair(capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: figures under a neighbour's load that look like any others; a report that is no JSON."""
    contender = Contender("one", "1.0", (), "/ready", {}, {"weights": "few"})
    result = {"shape": "small", **report((contender, contender), ASKED, MEASURED, 2)}
    assert json.loads(json.dumps(result)) == result
    print_table(result, sys.stdout)
    shown = capsys.readouterr().out
    assert "2.00 (1.33 .. 3.00)" in shown
    assert "others took up to 20%" in shown


def test_an_answer_of_other_length_ends_the_comparison() -> None:
    """Bug: one server stops early, or reuses a prompt, and counts as the faster one."""
    good = Outcome(0.0, 0.0, prompt_tokens=4, output_tokens=3)
    check("one", [good], ASKED)
    for bad in (
        replace(good, output_tokens=2),
        replace(good, prompt_tokens=5),
        replace(good, cached_tokens=3),
        replace(good, error="http 400"),
    ):
        with pytest.raises(SideFailed, match="one answered"):
            check("one", [good, bad], ASKED)


def test_prompts_are_token_ids_that_no_turn_repeats() -> None:
    """Bug: a second turn that finds its prompts in a cache; prompts that each side splits its own way."""
    first, second = prompts(ASKED, 1000, seed=1), prompts(ASKED, 1000, seed=2)
    assert len({prompt.text for prompt in first + second}) == 4
    body = IdTarget("http://unused", MODEL, "completions", {"temperature": 0}).body(first[0])
    assert len(body["prompt"]) == 4
    assert all(type(token) is int and 0 <= token < 1000 for token in body["prompt"])
    assert (body["max_tokens"], body["temperature"], body["stream"]) == (3, 0, True)


def test_llama_server_has_room_for_every_client() -> None:
    """Bug: a context that all slots share is too short for one prompt and answer each, and answers are cut off."""
    server = llama_server(("/bin/llama-server", "1"), "/files/a.gguf", SETUP, ("-fa", "on", "--kv-unified"))
    flags = dict(zip(server.command[1::2], server.command[2::2], strict=False))
    assert int(flags["-c"]) >= 8 * (128 + 128)
    assert flags["-np"] == "8"


def test_a_quantized_cache_of_the_peer_needs_flash_attention() -> None:
    """Bug: choices that llama-server refuses to start with."""
    assert {choice[1] for choice in peer_choices("f16")} == {"on", "off"}
    assert {choice[1] for choice in peer_choices("q8_0")} == {"on"}


def test_the_peers_version() -> None:
    """Bug: a program that is no llama-server, found out only after minutes of writing weights."""
    assert parse_version("load_backend: cpu\nversion: 7000 (abc)\nbuilt with cc\n") == "7000 (abc)"
    with pytest.raises(SideFailed, match="is not llama"):
        parse_version("cat 9.1")
    with pytest.raises(SideFailed, match="no program"):
        find_program("/no/such/llama-server")


def test_every_token_of_the_made_up_vocabulary_is_text(tmp_path: Path) -> None:
    """Bug: tokens without text, so that the first one a client sees is not the first one computed."""
    write_tokenizer(tmp_path, 300)
    tokenizer = load_tokenizer(tmp_path)
    pieces = {tokenizer.decode([token]) for token in range(300)}
    assert len(pieces) == 300
    assert all(piece.strip() for piece in pieces)


def test_our_server_answers_the_clients(tmp_path: Path) -> None:
    """Bug: fields that our own server refuses; processor time of the engine's process that is not counted."""
    command = (sys.executable, "-m", "server.cli", "serve", "--served-name", MODEL, "--threads", "1")
    with started(Contender("nibble", "1", command, "/ready", {}, {}), tmp_path) as server:
        turn = ask(server, ASKED, 200, 1)
        assert turn.output_tok_per_s > 0
        assert turn.total_tok_per_s > turn.output_tok_per_s
        engine = psutil.Process(server.process_id).children()[0]
        both = cpu_seconds(server.process_id) + cpu_seconds(engine.pid)
        assert server.cpu_seconds > both - TICK_S
