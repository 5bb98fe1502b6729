"""Our side of a comparison:  python -m benchmarks.peers.nibble

The model's forward pass as the engine runs it: the same batches, cache and kernels, without scheduling and sampling.
"""

import importlib.metadata
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import Affine, Ternary, Weights, write_checkpoint
from benchmarks.peers.protocol import Refused, Setup, answer_requests
from benchmarks.shapes import SHAPES, Shape
from engine.assembly import StartError, build
from engine.batch import BatchRow, build_batch
from engine.config import EngineConfig
from engine.loading import HEAD_GROUP
from engine.messages import PlanSummary
from kernels import native
from kernels.attention.quantized.layout import RECENT_TOKENS

FORMATS = {
    "g32": Affine(4, 32),  # as many bits as Q4_0; with 8 bits as Q8_0
    "g32-asymmetric": Affine(4, 32, symmetric=False),
    "g64": Affine(4, 64),
    "g128": Affine(4, 128),
}
DEFAULT_FORMAT = "g32"
BITS = (2, 4, 8)
TERNARY_BITS = 1.6
CHUNK = 512  # tokens of a prompt in one step: the engine's default
SPARE_BYTES = 1 << 20
WARM_TOKEN = 5


def prepare(setup: Setup) -> str:
    """Write the checkpoint when it is not there; returns its folder. Raises Refused for a format we cannot write."""
    folder = _folder(setup)
    if not (folder / "config.json").is_file():
        write_checkpoint(folder, _shape(setup), _weights(setup))
    return str(folder)


class Nibble:
    """A model in this engine: protocol.Model."""

    def __init__(self, setup: Setup) -> None:
        self._work = setup.work
        shape, weights = _shape(setup), _weights(setup)
        cache = 4 * 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim  # bytes a token at most, in float32
        num_tokens = setup.work.batch * (setup.work.num_positions + 2 * CHUNK)
        config = EngineConfig(
            str(_folder(setup)),
            kv_policy=setup.cache,
            kv_memory=cache * num_tokens + SPARE_BYTES,
            max_model_len=setup.work.num_positions,
            max_num_seqs=setup.work.batch,
            max_batch_tokens=CHUNK,
            prefix_caching=False,
            threads=setup.threads,
        )
        try:
            core, plan = build(config)
        except StartError as error:
            raise Refused(str(error)) from error
        self._parts = core.parts
        pages_each = -(-setup.work.num_positions // plan.page_size)
        self._tables = [list(range(i * pages_each, (i + 1) * pages_each)) for i in range(setup.work.batch)]
        self._recent = RecentPages(plan.num_recent_pages // setup.work.batch)
        if not setup.work.prefill:
            for sequence in range(setup.work.batch):
                self._prefill(sequence, setup.work.context)
        self.measure()  # the first run touches memory for the first time
        self.facts = {
            "name": "nibble",
            "versions": {package: importlib.metadata.version(package) for package in ("nibble-server", "torch")},
            "features": f"native kernels: {native.isa() or native.MISSING}",
            "shape": setup.shape,
            "num_layers": shape.num_layers,
            **_bytes_of(shape, weights, plan),
            "cache": setup.cache,
            "settings": {use.what: use.kernel for use in plan.kernels},
            "notes": list(plan.notes),
        }

    def measure(self) -> tuple[float, int]:
        work = self._work
        started = time.perf_counter()
        if work.prefill:
            self._prefill(0, work.prefill)
            return time.perf_counter() - started, work.prefill
        for step in range(work.tokens):
            self._run([(sequence, [WARM_TOKEN + step], work.context + step) for sequence in range(work.batch)])
        return time.perf_counter() - started, work.tokens * work.batch

    def _prefill(self, sequence: int, num_tokens: int) -> None:
        """In chunks, as the engine does; logits are computed for the last token only."""
        for start in range(0, num_tokens, CHUNK):
            stop = min(start + CHUNK, num_tokens)
            tokens = [WARM_TOKEN + i % 1000 for i in range(start, stop)]
            self._run([(sequence, tokens, start)], num_logits=int(stop == num_tokens))

    def _run(self, rows: list[tuple[int, list[int], int]], num_logits: int = 1) -> None:
        """One forward pass of (sequence, tokens, position of the first)."""
        size = self._parts.plan.page_size
        batch = build_batch(
            [
                BatchRow(
                    tokens, start, self._tables[sequence], size, num_logits, self._recent.of(sequence, start, tokens)
                )
                for sequence, tokens, start in rows
            ]
        )
        self._parts.runner.run(batch)


@dataclass(frozen=True)
class RecentPages:
    """Pages for what is kept in high precision: each sequence has the first for its sinks, the rest in a ring."""

    num_each: int  # 0: the cache has none

    def of(self, sequence: int, start: int, tokens: list[int]) -> dict[int, int]:
        """position // RECENT_TOKENS -> page, for rows at `start` and all before them that are not overwritten yet."""
        if self.num_each == 0:
            return {}
        ring, last = self.num_each - 1, (start + len(tokens) - 1) // RECENT_TOKENS
        first = sequence * self.num_each
        held = {at: first + 1 + at % ring for at in range(max(1, last - ring + 1), last + 1)}
        return {0: first, **held}


def _shape(setup: Setup) -> Shape:
    return SHAPES[setup.shape].with_layers(setup.num_layers)


def _folder(setup: Setup) -> Path:
    return (
        Path(setup.folder) / f"{setup.shape}-{_shape(setup).num_layers}-{_weights(setup).describe().replace(' ', '-')}"
    )


def _weights(setup: Setup) -> Weights:
    """Raises Refused for a format that cannot be written."""
    name = setup.variant or DEFAULT_FORMAT
    if setup.bits == TERNARY_BITS:
        return Ternary()
    if setup.bits not in BITS:
        raise Refused(f"{setup.bits} bits are not one of {', '.join(map(str, BITS))}, or {TERNARY_BITS} for ternary")
    if name not in FORMATS:
        raise Refused(f"format {name!r} is not known: use one of {', '.join(FORMATS)}")
    return Affine(int(setup.bits), FORMATS[name].group_size, FORMATS[name].symmetric)


def _bytes_of(shape: Shape, weights: Weights, plan: PlanSummary) -> dict[str, Any]:
    """What a step must read, as the kernels keep it."""
    head = Affine(8, HEAD_GROUP)
    head_bytes = shape.vocab * shape.hidden * head.bits_per_weight / 8
    layer_bytes = sum(use.num_bytes for use in plan.kernels) - head_bytes
    return {
        "weights": weights.describe(),
        "bits_per_weight": 8 * layer_bytes / shape.layer_weights,
        "layer_bytes": layer_bytes,
        "head": head.describe(),
        "head_bytes": head_bytes,
        "cache_bytes_per_token": plan.kv_bytes_per_token,
    }


if __name__ == "__main__":
    answer_requests(prepare, Nibble)
