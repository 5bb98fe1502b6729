"""A cache that stays full:  python -m benchmarks.kv_soak [--requests 1500] [--policy k4v4:w32] [--swap 2]

Requests of random lengths, priorities and numbers of choices begin alike or not, come faster than they are served, are
cancelled now and then, preempt each other, and are swapped or computed again. Every answer must be the one that its
request gets alone, to the last bit, the books must balance after every step, and in the end every page must be free.
"""

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from benchmarks.checkpoints import Affine, write_checkpoint
from benchmarks.shapes import Shape
from engine.assembly import build, make_manager
from engine.config import EngineConfig
from engine.core import EngineCore, Parts
from engine.messages import Cancel, Done, Event, Failed, Inbound, Logprobs, Sampling, Submit, Token

SHAPE = Shape(128, 256, 2, 4, 2, 32, 128, True)
PAGE_SIZE = 16
LONGEST = 320  # tokens of a sequence
NUM_LONGEST = 2  # such sequences have room
MAX_LIVE = 12  # requests
NUM_KINDS = 40  # different requests: what each gets alone is computed once
CANCELLED = 0.03  # of steps that cancel a request
Answer = list[tuple[int, Logprobs | None]]


class WrongAnswer(RuntimeError):
    """An answer differs from the one that its request gets alone, or something was lost."""


@dataclass
class Live:
    """A request that is not finished."""

    kind: int
    num_open: int  # choices
    answers: dict[int, Answer] = field(default_factory=dict)


class Soak:
    """An engine that is kept full, and one that answers each request alone."""

    def __init__(self, parts: Parts, swap_sequences: float, seed: int) -> None:
        layout = parts.storage.layout
        num_pages = NUM_LONGEST * LONGEST // PAGE_SIZE
        rule = layout.read_rule
        plan = msgspec.structs.replace(
            parts.plan,
            num_pages=num_pages,
            num_recent_pages=0 if rule is None else 2 * NUM_LONGEST * rule.max_pages,
            swap_bytes=int(swap_sequences * LONGEST // PAGE_SIZE * layout.bytes_per_page),
        )
        self.core = EngineCore(replace(parts, plan=plan, manager=make_manager(plan, layout, "soak")))
        self.counts: Counter[str] = Counter()
        self._parts = parts
        self._random = random.Random(seed)
        self._expected: dict[int, dict[int, Answer]] = {}  # kind -> choice -> answer
        self._live: dict[str, Live] = {}

    def run(self, num_requests: int) -> dict[str, int]:
        """Raises WrongAnswer."""
        self._expected = {kind: self._alone(kind) for kind in range(NUM_KINDS)}
        while self._live or self.counts["requests"] < num_requests:
            inbox: list[Inbound] = []
            if self.counts["requests"] < num_requests and len(self._live) < MAX_LIVE:
                inbox.append(self._next())
            if self._live and self._random.random() < CANCELLED:
                inbox.append(Cancel(self._random.choice(list(self._live))))
            self._hear(self.core.step(inbox))
            self.core.check_integrity()
        stats = self.core.stats()
        if stats.pages_used or stats.swap_bytes_used:
            raise WrongAnswer(f"{stats.pages_used} pages and {stats.swap_bytes_used} bytes of swap space were lost")
        names = ("preemptions_total", "swaps_out_total", "swaps_in_total", "prefix_hits_total", "steps_total")
        return dict(self.counts) | {name.removesuffix("_total"): getattr(stats, name) for name in names}

    def _alone(self, kind: int) -> dict[int, Answer]:
        """What a request gets from a cold engine with room."""
        parts = self._parts
        core = EngineCore(replace(parts, manager=make_manager(parts.plan, parts.storage.layout, "alone")))
        found: dict[int, Answer] = {}
        events = core.step([request_of(kind, "alone")])
        while core.has_work:
            events += core.step([])
        for event in events:
            if isinstance(event, Token):
                found.setdefault(event.index, []).append((event.token, event.logprobs))
        return found

    def _next(self) -> Submit:
        request = request_of(self._random.randrange(NUM_KINDS), f"{self.counts['requests']}")
        self.counts["requests"] += 1
        self._live[request.id] = Live(request.sampling.seed or 0, request.n)
        return msgspec.structs.replace(request, priority=self._random.randint(-1, 1))

    def _hear(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Failed):
                raise WrongAnswer(f"request {event.id} failed: {event.message}")
            live = self._live[event.id]
            if isinstance(event, Token):
                live.answers.setdefault(event.index, []).append((event.token, event.logprobs))
            elif isinstance(event, Done):
                self._end(event, live)

    def _end(self, done: Done, live: Live) -> None:
        found, expected = live.answers.get(done.index, []), self._expected[live.kind][done.index]
        cancelled = done.reason == "cancelled"
        if found != (expected[: len(found)] if cancelled else expected):
            raise WrongAnswer(f"choice {done.index} of request {done.id} (kind {live.kind}) is not what it gets alone")
        self.counts["cancelled" if cancelled else "equal"] += 1
        live.num_open -= 1
        if live.num_open == 0:
            del self._live[done.id]


def request_of(kind: int, name: str) -> Submit:
    """The same for every call: half of the kinds begin alike, a third have three choices."""
    source = random.Random(kind)
    shared = [i * 7 % SHAPE.vocab for i in range(source.randrange(LONGEST // 2))] if kind % 2 else []
    own = [source.randrange(SHAPE.vocab) for _ in range(source.randint(1, LONGEST // 4))]
    sampling = Sampling(source.randint(1, LONGEST // 4), temperature=1.0, seed=kind, ignore_eos=True, num_logprobs=2)
    return Submit(name, [*shared, *own], sampling, arrival=0.0, n=3 if kind % 3 == 0 else 1)


def soak(policy: str, swap_sequences: float, num_requests: int, folder: Path, seed: int = 0) -> dict[str, int]:
    """Counts of what happened. The model is written to `folder`. Raises WrongAnswer."""
    write_checkpoint(folder, SHAPE, Affine(4, 32))
    core, _ = build(EngineConfig(str(folder), kv_policy=policy, page_size=PAGE_SIZE, max_num_seqs=16, threads=1))
    return Soak(core.parts, swap_sequences, seed).run(num_requests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--policy", default="k4v4:w32")
    parser.add_argument("--swap", type=float, default=2, help="longest sequences that the swap space holds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        counts = soak(options.policy, options.swap, options.requests, Path(folder), options.seed)
    print(
        json.dumps(
            {
                "benchmark": "kv_soak",
                "policy": options.policy,
                "swap": options.swap,
                "s": round(time.monotonic() - started),
                **counts,
            }
        )
    )


if __name__ == "__main__":
    main()
