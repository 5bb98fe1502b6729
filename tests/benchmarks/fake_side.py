"""A side that answers at once: python -m tests.benchmarks.fake_side. Its weight format says how it behaves."""

import os
from typing import Any

from benchmarks.peers.protocol import Refused, Setup, answer_requests

SECONDS = {"fast": 0.5, "slow": 1.0}
MIB = 1 << 20


class FakeModel:
    def __init__(self, setup: Setup) -> None:
        os.system("echo a library that greets on stdout")
        self._setup = setup
        self.facts: dict[str, Any] = {
            "name": setup.variant,
            "shape": setup.shape,
            "num_layers": 1,
            "weights": setup.variant,
            "bits_per_weight": 4.5,
            "layer_bytes": 3 * MIB,
            "head": "8-bit",
            "head_bytes": MIB,
            "cache": setup.cache,
            "cache_bytes_per_token": 1024,
            "settings": {"prepared": setup.prepared},
            "notes": [],
        }

    def measure(self) -> tuple[float, int]:
        return SECONDS[self._setup.variant], self._setup.work.tokens


def prepare(setup: Setup) -> str:
    if setup.variant not in SECONDS:
        raise Refused(f"{setup.variant} is neither fast nor slow")
    return f"in process {os.getpid()}"


if __name__ == "__main__":
    answer_requests(prepare, FakeModel)
