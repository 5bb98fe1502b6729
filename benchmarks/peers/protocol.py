"""What benchmarks.against and its two sides say to each other: one JSON object a line, on stdin and stdout.

    -> {"prepare": {...}}   <- {"prepared": "..."}                    files are written, settings chosen
    -> {"open": {...}}      <- {"facts": {...}}                       the model is loaded and warmed up
    -> {"measure": {}}      <- {"seconds": 1.2, "tokens": 32}         the work, once
    -> {"finish": {}}       <- {"peak_rss_mib": 1234.5}               and the process ends

What a side prepares must not count as memory of the model, so it is done in a process of its own.
Only the standard library is imported: a peer's interpreter need not have ours.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Work:
    """What one measurement does: a prompt of `prefill` tokens, or else `tokens` steps of `batch` sequences."""

    prefill: int  # tokens of the prompt whose processing is timed; 0: decoding is timed
    batch: int  # sequences that decode together
    context: int  # tokens each sequence holds before the first timed step
    tokens: int  # steps in one measurement

    @property
    def num_positions(self) -> int:
        """The longest a sequence gets."""
        return self.prefill or self.context + self.tokens


@dataclass(frozen=True)
class Setup:
    """What a side loads, and what it will be asked to do."""

    shape: str
    num_layers: int | None  # None: all
    bits: float
    variant: str  # the side's own name of a weight format; "": its default for `bits`
    cache: str  # the side's own name of a cache format
    threads: int
    folder: str  # where files with weights are, or are written to
    work: Work
    prepared: str = ""  # what the side answered to "prepare"

    def to_line(self, request: str) -> str:
        return json.dumps({request: asdict(self)})

    @staticmethod
    def read(fields: dict[str, Any]) -> "Setup":
        return Setup(**{**fields, "work": Work(**fields["work"])})


class Model(Protocol):
    """A loaded model."""

    facts: dict[str, Any]  # what `Facts` of benchmarks.against reads

    def measure(self) -> tuple[float, int]:
        """Do the work once; returns (seconds, tokens)."""
        ...


class Refused(RuntimeError):
    """The side cannot do what is asked; the message says what to do."""


def answer_requests(prepare: Callable[[Setup], str], load: Callable[[Setup], Model]) -> None:
    """Serve one benchmark on stdin and stdout. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    model: Model | None = None
    for line in sys.stdin:
        ((request, fields),) = json.loads(line).items()
        answer: dict[str, Any] = {}
        try:
            if request == "prepare":
                answer = {"prepared": prepare(Setup.read(fields))}
            elif request == "open":
                model = load(Setup.read(fields))
                answer = {"facts": model.facts}
            elif request == "measure" and model is not None:
                seconds, tokens = model.measure()
                answer = {"seconds": seconds, "tokens": tokens}
            else:
                answer = {"peak_rss_mib": peak_rss_mib()}
        except Refused as error:
            answer = {"refused": str(error)}
        print(json.dumps(answer), file=answers, flush=True)
        if request == "finish":
            return


def peak_rss_mib() -> float:
    """The most memory this process has had resident, pages of mapped files included."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 1024
