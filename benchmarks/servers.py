"""Side by side with another server:  python -m benchmarks.servers --peer-server llama-server --bits 4

Random weights of a public shape, on both sides with as many bits, scales and output head included. Both servers run
and take turns (A B A B ...) on the same threads: the clients of `nibble bench serve` ask one of them while the other
has nothing to do, and around the turns the machine's read bandwidth is measured. Prompts are token ids drawn anew for
each turn, answers have a fixed length, and both servers must count exactly these tokens.

`--peer-server` is llama.cpp's llama-server, built for this machine; its choices of flash attention and of one cache or
one each are tried, and the fastest is measured. `--peer-python` is any environment with `pip install gguf`, which
writes its file. Prints a table and, last, one line of JSON. Ratios are ours over the peer's: of tokens per second above
1, of times below 1 when we are faster.
"""

import argparse
import asyncio
import importlib.metadata
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, TextIO

import psutil

from benchmarks.against import QUIET_SHARE, Side, SideFailed
from benchmarks.machine import Roof, cpu_name, machine_seconds, measure_roof, median_roof, wait_until_quiet
from benchmarks.monitoring import free_port, running
from benchmarks.peers.protocol import Setup, Work
from benchmarks.shapes import SHAPES
from server.bench import load
from server.bench.arrivals import Arrivals
from server.bench.client import Outcome, Target
from server.bench.datasets import Prompt
from server.bench.results import summarize

OUR_FILES = "benchmarks.peers.nibble_server"
PEER_FILES = "benchmarks.peers.llama_server"
MODEL = "bench"
SILENCE_LIMIT_S = 600.0
LOG_CHARS = 1000  # shown of a server's log when a turn fails
WARM_TOKENS = 16  # of each answer of the round that is not counted
SLOT_STEP = 256  # positions of one sequence are a multiple of this, as llama.cpp pads them
HIGHER = ("output_tok_per_s", "total_tok_per_s")  # of the figures below, those of which more is better
LABELS = {
    "output_tok_per_s": "output tok/s",
    "total_tok_per_s": "total tok/s",
    "ttft_p50_s": "first token p50, s",
    "tpot_p50_s": "per token p50, s",
}


@dataclass(frozen=True)
class Load:
    """What is asked in one turn."""

    num_requests: int
    num_clients: int  # each sends its next request when its last one is answered
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Contender:
    """A server that can be started."""

    name: str
    version: str
    command: tuple[str, ...]  # without its port
    ready: str  # the path that answers 200 once requests are taken
    extra: dict[str, Any]  # fields of every request beyond OpenAI's
    settings: dict[str, str]  # for the report


@dataclass(frozen=True)
class Running:
    """A server that was started."""

    contender: Contender
    url: str
    process_id: int

    @property
    def cpu_seconds(self) -> float:
        """User and system time of the server and its processes so far."""
        first = psutil.Process(self.process_id)
        return sum(sum(process.cpu_times()[:2]) for process in (first, *first.children(recursive=True)))


@dataclass(frozen=True)
class Round:
    """What clients saw in one turn."""

    output_tok_per_s: float
    total_tok_per_s: float
    ttft_p50_s: float
    tpot_p50_s: float


@dataclass(frozen=True)
class Turns:
    """How the servers take turns."""

    num_rounds: int
    patience_s: float  # how long to wait, before each round, for other processes to let go of the cores
    threads: int
    vocab: int


@dataclass(frozen=True)
class Measured:
    """What was measured, turn by turn."""

    ours: list[Round]
    peer: list[Round]
    roofs: list[Roof]  # before each round, and after the last
    idle_share: float  # of one core, that the waiting server used while the other was asked
    others_share: list[float]  # of all cores, that neither the servers nor their clients used


class IdTarget(Target):
    """A server that is given token ids: a prompt's text is their numbers."""

    def body(self, prompt: Prompt) -> dict[str, Any]:
        return {**super().body(prompt), "prompt": [int(number) for number in prompt.text.split()]}


def main() -> None:
    args = _arguments()
    asked = Load(args.requests, args.clients, args.prompt_tokens, args.output_tokens)
    turns = Turns(args.rounds, args.patience, args.threads, SHAPES[args.shape].vocab)
    try:
        program = find_program(args.peer_server)
        with ExitStack() as stack:
            logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            folder = (args.keep or logs).resolve()
            folder.mkdir(parents=True, exist_ok=True)
            work = Work(0, asked.num_clients, asked.prompt_tokens, asked.output_tokens)
            setup = Setup(args.shape, args.layers, args.bits, args.format, args.cache, args.threads, str(folder), work)
            ours = our_server(write_files(sys.executable, OUR_FILES, setup), setup)
            setup = replace(setup, variant=args.peer_format, cache=args.peer_cache)
            path = write_files(args.peer_python, PEER_FILES, setup)
            choices = [llama_server(program, path, setup, choice) for choice in peer_choices(setup.cache)]
            peer = fastest(choices, replace(asked, num_requests=asked.num_clients), turns.vocab, logs)
            result = {"benchmark": "servers", "shape": args.shape, **compare(ours, peer, asked, turns, logs)}
    except SideFailed as error:
        sys.exit(f"benchmarks.servers: {error}")
    print_table(result, sys.stderr if args.json else sys.stdout)
    print(json.dumps(result))


def write_files(python: str, module: str, setup: Setup) -> str:
    """Have the weights written, in a process that then ends; returns where they are. Raises SideFailed."""
    with Side(python, module) as side:
        return str(side.ask(setup.to_line("prepare"))["prepared"])


def our_server(folder: str, setup: Setup) -> Contender:
    """Ours as it is by default, on so many threads."""
    command = [sys.executable, "-m", "server.cli", "serve", folder, "--served-name", MODEL]
    command += ["--threads", str(setup.threads), "--kv", setup.cache]
    settings = {"weights": Path(folder).name, "cache": setup.cache}
    return Contender("nibble", importlib.metadata.version("nibble-server"), tuple(command), "/ready", {}, settings)


def peer_choices(cache: str) -> list[tuple[str, ...]]:
    """Settings of llama-server that change nothing but speed. A quantized value cache needs flash attention."""
    flashes = ("off", "on") if cache == "f16" else ("on",)
    return [("-fa", flash, kind) for flash, kind in product(flashes, ("--kv-unified", "--no-kv-unified"))]


def llama_server(program: tuple[str, str], path: str, setup: Setup, choice: tuple[str, ...]) -> Contender:
    """llama.cpp's (path, version), with a slot for each client and without a memory of earlier prompts."""
    slots, threads = setup.work.batch, str(setup.threads)
    positions = -(-(setup.work.num_positions + 1) // SLOT_STEP) * SLOT_STEP
    command = [program[0], "-m", path, "--alias", MODEL, "-np", str(slots), "-c", str(slots * positions), "-cb"]
    command += ["-t", threads, "-tb", threads, "-ctk", setup.cache, "-ctv", setup.cache, "--cache-ram", "0", *choice]
    settings = {"weights": Path(path).name, "cache": setup.cache, "fastest of those tried": " ".join(choice)}
    extra = {
        "cache_prompt": False,
        "samplers": ["top_k"],
        "top_k": 1,
    }  # greedy, without the samplers that change nothing
    return Contender("llama-server", program[1], tuple(command), "/health", extra, settings)


def find_program(name: str) -> tuple[str, str]:
    """(absolute path, version) of llama-server, named as on the command line. Raises SideFailed when it is none."""
    found = shutil.which(name)
    if found is None:
        raise SideFailed(f"--peer-server {name} is no program: build llama.cpp's llama-server and give its path")
    path = str(Path(found).absolute())
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SideFailed(f"--peer-server {path} cannot be run: {error}") from None
    return path, parse_version(done.stdout + done.stderr)


def parse_version(text: str) -> str:
    """The version in the output of `llama-server --version`. Raises SideFailed when there is none."""
    for line in text.splitlines():
        if line.startswith("version:"):
            return line.removeprefix("version:").strip()
    raise SideFailed(f"--peer-server is not llama.cpp's llama-server: --version says {text.strip()[:200]!r}")


@contextmanager
def started(contender: Contender, logs: Path) -> Iterator[Running]:
    """The server, from the moment it takes requests. Ends the program, with its log, when it does not start."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [*contender.command, "--port", str(port)]
    log = logs / f"{contender.name}.log"
    with running(command, url + contender.ready, log) as process:
        try:
            yield Running(contender, url, process.pid)
        except SideFailed as error:
            status, end = process.poll(), log.read_text(errors="replace")[-LOG_CHARS:]
            raise SideFailed(f"{error}\n{contender.name}, status {status}, wrote: {end}") from None


def fastest(choices: Sequence[Contender], asked: Load, vocab: int, logs: Path) -> Contender:
    """The one that gives most tokens per second."""
    rates: dict[int, float] = {}
    for number, choice in enumerate(choices):
        with started(choice, logs) as server:
            rates[number] = ask(server, asked, vocab, 0).output_tok_per_s
        print(f"{choice.name} {choice.command[-3:]}: {rates[number]:.1f} tok/s", file=sys.stderr)
    return choices[max(rates, key=lambda number: rates[number])]


def ask(server: Running, asked: Load, vocab: int, seed: int) -> Round:
    """One turn. Raises SideFailed when an answer has not the tokens asked for."""
    target = IdTarget(
        server.url, MODEL, "completions", {"temperature": 0, "ignore_eos": True, **server.contender.extra}
    )

    async def send() -> load.Run:
        async with load.new_client(None, SILENCE_LIMIT_S) as client:
            client.headers["Connection"] = "close"  # llama-server drops some of the connections that are used again
            return await load.run(client, target, prompts(asked, vocab, seed), Arrivals(clients=asked.num_clients))

    outcomes = asyncio.run(send()).outcomes
    check(server.contender.name, outcomes, asked)
    seen = summarize(outcomes, None)
    p50 = {name: seen.spreads[name].percentiles["p50"] for name in ("ttft", "tpot")}
    return Round(seen.output_tokens_per_s, seen.total_tokens_per_s, p50["ttft"], p50["tpot"])


def prompts(asked: Load, vocab: int, seed: int) -> list[Prompt]:
    """Token ids drawn at random: none begins as another did, in this turn or one before."""
    rng = random.Random(seed)
    drawn = (rng.choices(range(vocab), k=asked.prompt_tokens) for _ in range(asked.num_requests))
    return [Prompt(" ".join(map(str, ids)), asked.output_tokens) for ids in drawn]


def check(name: str, outcomes: Sequence[Outcome], asked: Load) -> None:
    """Raises SideFailed unless each request was answered whole, with as many tokens as all others and none reused."""
    wanted = (None, asked.prompt_tokens, asked.output_tokens, 0)
    for outcome in outcomes:
        found = (outcome.error, outcome.prompt_tokens, outcome.output_tokens, outcome.cached_tokens)
        if found != wanted:
            raise SideFailed(
                f"{name} answered (error, prompt, output, cached tokens) {found} where {wanted} was asked: "
                f"{outcome.answer}"
            )


def compare(ours: Contender, peer: Contender, asked: Load, turns: Turns, logs: Path) -> dict[str, Any]:
    """Start both servers, have them take turns, and report. Raises SideFailed."""
    with started(ours, logs) as our_server, started(peer, logs) as peer_server:
        measured = take_turns(our_server, peer_server, asked, turns)
    return report((ours, peer), asked, measured, turns.threads)


def take_turns(ours: Running, peer: Running, asked: Load, turns: Turns) -> Measured:
    """A B A B ..., the machine's roof before each round and after the last. Seeds count up; a warm-up comes first."""
    warm = Load(asked.num_clients, asked.num_clients, asked.prompt_tokens, WARM_TOKENS)
    for server in (ours, peer):
        ask(server, warm, turns.vocab, 0)
    rounds: dict[str, list[Round]] = {ours.url: [], peer.url: []}
    roofs: list[Roof] = []
    others: list[float] = []
    idle = elapsed = 0.0
    for number in range(1, turns.num_rounds + 1):
        wait_until_quiet(QUIET_SHARE, turns.patience_s)
        roofs.append(measure_roof(turns.threads))
        for server, waiting in ((ours, peer), (peer, ours)):
            busy, total = machine_seconds()
            own, idled, started_at = server.cpu_seconds + time.process_time(), waiting.cpu_seconds, time.perf_counter()
            rounds[server.url].append(ask(server, asked, turns.vocab, number))
            print(f"{server.contender.name}, round {number}: {rounds[server.url][-1]}", file=sys.stderr)
            elapsed += time.perf_counter() - started_at
            own, idled = server.cpu_seconds + time.process_time() - own, waiting.cpu_seconds - idled
            busy, total = (after - before for after, before in zip(machine_seconds(), (busy, total), strict=True))
            idle += idled
            others.append(max(0.0, busy - own - idled) / max(total, 1e-9))
    roofs.append(measure_roof(turns.threads))
    return Measured(rounds[ours.url], rounds[peer.url], roofs, idle / elapsed, others)


def ratios(measured: Measured, name: str) -> dict[str, Any]:
    """Ours over the peer's: of the medians, and of each round."""
    ours, peer = ([getattr(turn, name) for turn in side] for side in (measured.ours, measured.peer))
    pairs = [a / b for a, b in zip(ours, peer, strict=True)]
    ratio = statistics.median(ours) / statistics.median(peer)
    return {"ratio": ratio, "min": min(pairs), "max": max(pairs), "pairs": pairs}


def report(sides: tuple[Contender, Contender], asked: Load, measured: Measured, threads: int) -> dict[str, Any]:
    """What is printed of a comparison of (ours, the peer)."""
    roof = median_roof(measured.roofs)
    return {
        "load": asdict(asked),
        "threads": threads,
        "cpu": cpu_name(),
        "ratios": {name: ratios(measured, name) for name in LABELS},
        "ours": _side(sides[0], measured.ours),
        "peer": _side(sides[1], measured.peer),
        "read_gb_per_s": roof.read_all,
        "read_gb_per_s_of_each_probe": [probe.read_all for probe in measured.roofs],
        "int8_gop_per_s": roof.dot_all,
        "idle_share_of_a_core": measured.idle_share,
        "others_share": max(measured.others_share),
        "others_share_of_each_turn": measured.others_share,
    }


def _side(contender: Contender, rounds: Sequence[Round]) -> dict[str, Any]:
    """One side's part of the result."""
    medians = {name: statistics.median(getattr(turn, name) for turn in rounds) for name in LABELS}
    return {
        "name": contender.name,
        "version": contender.version,
        "settings": contender.settings,
        **medians,
        "rounds": [asdict(turn) for turn in rounds],
    }


def print_table(result: dict[str, Any], file: TextIO) -> None:
    def say(line: str) -> None:
        print(line, file=file)

    ours, peer, asked = result["ours"], result["peer"], result["load"]
    say(
        f"{result['shape']}, {asked['num_requests']} requests of {asked['prompt_tokens']} + {asked['output_tokens']} "
        f"tokens, {asked['num_clients']} at once, {result['threads']} threads, {result['cpu']}"
    )
    say(f"{'':>20} {ours['name']:>14} {peer['name']:>14}   ratio")
    for name, label in LABELS.items():
        ratio, digits = result["ratios"][name], 1 if name in HIGHER else 3
        cells = " ".join(f"{side[name]:>14.{digits}f}" for side in (ours, peer))
        say(f"{label:>20} {cells}   {ratio['ratio']:.2f} ({ratio['min']:.2f} .. {ratio['max']:.2f})")
    probes = " ".join(f"{rate:.1f}" for rate in result["read_gb_per_s_of_each_probe"])
    say(f"memory reads, before each round and after the last: {probes} GB/s")
    for side in (ours, peer):
        say(f"{side['name']} {side['version']}: " + ", ".join(f"{k}: {v}" for k, v in side["settings"].items()))
    if result["others_share"] > QUIET_SHARE:
        say(f"warning: not a fair comparison: others took up to {result['others_share']:.0%} of the cores in a turn")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.servers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer-server", required=True, metavar="PATH", help="llama.cpp's llama-server")
    parser.add_argument("--peer-python", default=sys.executable, metavar="PATH", help="interpreter that has gguf")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--layers", type=int, help="only so many layers: a quick look")
    parser.add_argument("--bits", type=float, default=4, help="8, 4, 2, or 1.6 for ternary weights")
    parser.add_argument("--format", default="", help="ours instead of g32: g32-asymmetric, g64, g128")
    parser.add_argument("--peer-format", default="", help="the peer's instead of its usual: q4_k, iq4_nl, tq1_0, ...")
    parser.add_argument("--cache", default="auto", help="our KV cache policy")
    parser.add_argument("--peer-cache", default="f16", help="f16, q8_0 or q4_0")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--patience", type=float, default=0, metavar="S", help="wait so long for quiet before a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the weight files there for the next run")
    parser.add_argument("--json", action="store_true", help="keep stdout to the line of JSON; the table goes to stderr")
    return parser.parse_args()


if __name__ == "__main__":
    main()
