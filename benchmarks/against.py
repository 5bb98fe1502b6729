"""Side by side with another engine:  python -m benchmarks.against --peer llama.cpp --shape llama-3.2-1b --bits 4

Random weights of a public shape, on both sides with as many bits, scales and output head included. Each side is a
process that keeps its model loaded; they take turns (A B A B ...) on the same threads, and between the pairs the
machine's read bandwidth is measured. Work: one sequence decodes (default), `--batch 8` do, or with `--prefill 512` a
prompt is processed. Both sides compute logits, neither samples.

The peer runs in its own interpreter, `--peer-python`: any environment with `pip install llama-cpp-python gguf`.
Prints a table and, last, one line of JSON; the ratio is ours over the peer's, above 1 when we are faster.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from benchmarks.machine import Roof, cpu_name, cpu_seconds, machine_seconds, measure_roof, median_roof, wait_until_quiet
from benchmarks.peers.protocol import Setup, Work
from benchmarks.shapes import SHAPES

ROOT = Path(__file__).parent.parent
OURS = "benchmarks.peers.nibble"
PEERS = {"llama.cpp": "benchmarks.peers.llama_cpp"}
NEEDED = {"llama.cpp": ("llama_cpp", "gguf")}  # what its interpreter must be able to import
INSTALL = {"llama.cpp": "pip install llama-cpp-python gguf"}

QUIET_SHARE = 0.05  # of the cores taken by others; above, threads that wait for each other lose more than that share


class SideFailed(RuntimeError):
    """A side refused or died; the message says which and why."""


class Side:
    """One side's process."""

    def __init__(self, python: str, module: str) -> None:
        self._module = module
        command = [python, "-m", module]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    @property
    def cpu_seconds(self) -> float:
        return cpu_seconds(self._process.pid)

    def ask(self, line: str) -> dict[str, Any]:
        """Send one request. Raises SideFailed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(line, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise SideFailed(f"{self._module} ended before it was asked") from None
        text = self._process.stdout.readline()
        if not text:
            raise SideFailed(f"{self._module} ended with status {self._process.wait()}; its message is above")
        answer: dict[str, Any] = json.loads(text)
        if "refused" in answer:
            raise SideFailed(f"{self._module}: {answer['refused']}")
        return answer

    def rate(self) -> float:
        """Do the work once; tokens per second."""
        answer = self.ask('{"measure": {}}')
        return float(answer["tokens"] / answer["seconds"])


@dataclass(frozen=True)
class Turns:
    """How the sides take turns."""

    num_pairs: int
    patience_s: float  # how long to wait, before each pair, for other processes to let go of the cores


@dataclass(frozen=True)
class Pairs:
    """What was measured, turn by turn."""

    ours: list[float]  # tokens per second
    peer: list[float]
    roofs: list[Roof]
    idle_share: float  # of one core, that the waiting side used while the other ran
    others_share: list[float]  # of all cores, that neither side used, turn by turn

    @property
    def ratios(self) -> list[float]:
        return [ours / peer for ours, peer in zip(self.ours, self.peer, strict=True)]


def main() -> None:
    args = _arguments()
    work = Work(args.prefill, args.batch, args.context, args.tokens)
    try:
        with ExitStack() as stack:
            folder = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            folder.mkdir(parents=True, exist_ok=True)
            ours = Setup(args.shape, args.layers, args.bits, args.format, args.cache, args.threads, str(folder), work)
            peer = replace(ours, variant=args.peer_format, cache=args.peer_cache)
            turns = Turns(args.pairs, args.patience)
            check_peer(args.peer, args.peer_python)
            result = compare((sys.executable, OURS, ours), (args.peer_python, PEERS[args.peer], peer), turns)
    except SideFailed as error:
        sys.exit(f"benchmarks.against: {error}")
    print_table(result, sys.stderr if args.json else sys.stdout)
    print(json.dumps(result))


def compare(ours: tuple[str, str, Setup], peer: tuple[str, str, Setup], turns: Turns) -> dict[str, Any]:
    """Run both sides, each an (interpreter, module, setup), and report. Raises SideFailed."""
    ours, peer = _prepare(*ours), _prepare(*peer)
    with Side(*ours[:2]) as our_side, Side(*peer[:2]) as peer_side:
        our_facts = our_side.ask(ours[2].to_line("open"))["facts"]
        peer_facts = peer_side.ask(peer[2].to_line("open"))["facts"]
        pairs = take_turns(our_side, peer_side, turns, ours[2].threads)
        peaks = [side.ask('{"finish": {}}')["peak_rss_mib"] for side in (our_side, peer_side)]
    roof = median_roof(pairs.roofs)
    work = ours[2].work
    return {
        "benchmark": "against",
        "shape": ours[2].shape,
        "layers": our_facts["num_layers"],
        "work": describe(work),
        "threads": ours[2].threads,
        "cpu": cpu_name(),
        "ratio": statistics.median(pairs.ours) / statistics.median(pairs.peer),
        "ratio_min": min(pairs.ratios),
        "ratio_max": max(pairs.ratios),
        "pair_ratios": pairs.ratios,
        "ratio_of_best": max(pairs.ours) / max(pairs.peer),
        "ours": _report(our_facts, pairs.ours, peaks[0], roof, work),
        "peer": _report(peer_facts, pairs.peer, peaks[1], roof, work),
        "read_gb_per_s_1_thread": roof.read_one,
        "read_gb_per_s": roof.read_all,
        "int8_gop_per_s": roof.dot_all,
        "idle_share_of_a_core": pairs.idle_share,
        "others_share": max(pairs.others_share),
        "others_share_of_each_turn": pairs.others_share,
    }


def take_turns(ours: Side, peer: Side, plan: Turns, num_threads: int) -> Pairs:
    """A B A B ..., the machine's roof before each pair."""
    rates: dict[Side, list[float]] = {ours: [], peer: []}
    roofs: list[Roof] = []
    others: list[float] = []
    idle = elapsed = 0.0
    for _ in range(plan.num_pairs):
        wait_until_quiet(QUIET_SHARE, plan.patience_s)
        roofs.append(measure_roof(num_threads))
        for side, waiting in ((ours, peer), (peer, ours)):
            busy, total = machine_seconds()
            own, idled, started = side.cpu_seconds, waiting.cpu_seconds, time.perf_counter()
            rates[side].append(side.rate())
            elapsed += time.perf_counter() - started
            own, idled = side.cpu_seconds - own, waiting.cpu_seconds - idled
            busy, total = (after - before for after, before in zip(machine_seconds(), (busy, total), strict=True))
            idle += idled
            others.append(max(0.0, busy - own - idled) / max(total, 1e-9))
    return Pairs(rates[ours], rates[peer], roofs, idle / elapsed, others)


def describe(work: Work) -> str:
    if work.prefill:
        return f"prefill of {work.prefill} tokens"
    return f"{work.batch} sequence(s) decoding at a context of {work.context}"


def step_bytes(facts: dict[str, Any], work: Work) -> float:
    """Bytes that one step reads at least: all weights once, the cache of every sequence at its mean length."""
    context = work.prefill / 2 if work.prefill else work.context + work.tokens / 2
    cache = facts["cache_bytes_per_token"] * context * work.batch
    return float(facts["layer_bytes"] + facts["head_bytes"] + cache)


def _report(facts: dict[str, Any], rates: list[float], peak: float, roof: Roof, work: Work) -> dict[str, Any]:
    """One side's part of the result. A share of bandwidth means something where memory is what bounds: decoding."""
    rate = statistics.median(rates)
    num_bytes = step_bytes(facts, work)
    tokens_per_step = work.prefill or work.batch
    shape = SHAPES[facts["shape"]].with_layers(facts["num_layers"])
    weights_per_token = shape.layer_weights + shape.vocab * shape.hidden / (work.prefill or 1)  # one head a prompt
    gop_per_s = 2 * weights_per_token * rate / 1e9
    gb_per_s = num_bytes * rate / tokens_per_step / 1e9
    return {
        **facts,
        "tok_per_s": rate,
        "tok_per_s_best": max(rates),
        "rates": rates,
        "bytes_per_step": num_bytes,
        "bytes_per_token": num_bytes / tokens_per_step,
        "gb_per_s": gb_per_s,
        "percent_of_bandwidth": None if work.prefill else 100 * gb_per_s / roof.read_all,
        "percent_of_int8_peak": 100 * gop_per_s / roof.dot_all,
        "peak_rss_mib": peak,
    }


def print_table(result: dict[str, Any], file: TextIO) -> None:
    def say(line: str) -> None:
        print(line, file=file)

    ours, peer = result["ours"], result["peer"]
    say(f"{result['shape']}, {result['layers']} layers, {result['work']}, {result['threads']} threads, {result['cpu']}")
    say(f"{'':>22} {ours['name']:>20} {peer['name']:>20}")
    for label, key, form in (
        ("weights", "weights", "s"),
        ("bits per weight", "bits_per_weight", ".4g"),
        ("output head", "head", "s"),
        ("KV cache", "cache", "s"),
        ("tok/s, median", "tok_per_s", ".2f"),
        ("tok/s, best", "tok_per_s_best", ".2f"),
        ("MB read per token", "bytes_per_token", ".1f"),
        ("GB/s", "gb_per_s", ".1f"),
        ("% of bandwidth", "percent_of_bandwidth", ".0f"),
        ("% of int8 peak", "percent_of_int8_peak", ".0f"),
        ("peak RSS, MiB", "peak_rss_mib", ".0f"),
    ):
        values = (side[key] / 1e6 if key == "bytes_per_token" else side[key] for side in (ours, peer))
        cells = ("-" if value is None else format(value, form) for value in values)
        say(f"{label:>22} " + " ".join(f"{cell:>20}" for cell in cells))
    memory = f"{result['read_gb_per_s']:.1f} GB/s, {result['read_gb_per_s_1_thread']:.1f} with 1 thread"
    say(f"memory reads at {memory}; int8 dot products at {result['int8_gop_per_s']:.0f} GOP/s")
    say(
        f"ratio {result['ratio']:.2f} ({result['ratio_min']:.2f} .. {result['ratio_max']:.2f} in "
        f"{len(result['pair_ratios'])} pairs; {result['ratio_of_best']:.2f} of the best turns)"
    )
    for side in (ours, peer):
        for note in (*(f"{key}: {value}" for key, value in side["settings"].items()), *side["notes"]):
            say(f"{side['name']}: {note}")
    if result["others_share"] > QUIET_SHARE:
        say(f"warning: not a fair comparison: others took up to {result['others_share']:.0%} of the cores in a turn")


def _prepare(python: str, module: str, setup: Setup) -> tuple[str, str, Setup]:
    """Have the side write its files and choose its settings, in a process that then ends."""
    with Side(python, module) as side:
        prepared = side.ask(setup.to_line("prepare"))["prepared"]
    return python, module, replace(setup, prepared=prepared)


def check_peer(peer: str, python: str) -> None:
    """Raises SideFailed saying what to install when the interpreter cannot import the peer."""
    command = [python, "-c", "; ".join(f"import {module}" for module in NEEDED[peer])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tempfile.gettempdir())
    except OSError as error:
        raise SideFailed(f"--peer-python {python} cannot be run: {error}") from error
    if done.returncode != 0:
        reason = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
        raise SideFailed(
            f"{python} cannot import {peer}: {reason}. Run `{INSTALL[peer]}` in any environment and name its "
            "interpreter with --peer-python"
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.against", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument("--peer-python", default=sys.executable, metavar="PATH", help="interpreter that has the peer")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--layers", type=int, help="only so many layers: a quick look")
    parser.add_argument("--bits", type=float, default=4, help="8, 4, 2, or 1.6 for ternary weights")
    parser.add_argument("--format", default="", help="ours instead of g32: g32-asymmetric, g64, g128")
    parser.add_argument("--peer-format", default="", help="the peer's instead of its usual: q4_k, iq4_nl, tq1_0, ...")
    parser.add_argument("--cache", default="f16", help="our KV cache policy")
    parser.add_argument("--peer-cache", default="f16", help="f16, q8_0 or q4_0")
    parser.add_argument("--prefill", type=int, default=0, metavar="N", help="time a prompt of N tokens instead")
    parser.add_argument("--batch", type=int, default=1, help="sequences that decode together")
    parser.add_argument("--context", type=int, default=64, help="tokens each sequence holds already")
    parser.add_argument("--tokens", type=int, default=32, help="steps in one turn")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--patience", type=float, default=0, metavar="S", help="wait so long for quiet before a pair")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the weight files there for the next run")
    parser.add_argument("--json", action="store_true", help="keep stdout to the line of JSON; the table goes to stderr")
    return parser.parse_args()


if __name__ == "__main__":
    main()
