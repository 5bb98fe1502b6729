"""Recorded decode steps over the Triton attention kernels, under Triton's interpreter (test_gpu.py runs this file).
What stands for a recording runs the step again on the tensors that it was recorded with, as a CUDA graph does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from engine.assembly import make_manager
from engine.batch import Batch, BatchRow, build_batch
from engine.core import EngineCore, Parts
from engine.graphs import GraphRunner, Size
from engine.runner import Runner
from kernels.attention.f16.gpu import F16Triton
from kernels.attention.f16.layout import page_shape
from kernels.attention.quantized.gpu import QuantizedTriton
from kvcache.layout import PageLayout
from kvcache.policy import read_policy
from kvcache.storage import PageStorage
from tests.engine.queued import queued
from tests.engine.test_gpu_sampling import OnGpu
from tests.engine.worlds import EOS, make_core, run, submit, tokens_of
from tests.kernels.test_kv_attention import cache_of, codec_of

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 2, 2, 32, 16
SPLIT, BLOCK = 32, 16  # positions; the shipped ones are longer
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # as interpreted_attention.py


@dataclass(frozen=True)
class OneLayer:
    """Ids and positions to queries, keys and values; what is attended is the logits."""

    kernel: Any

    def forward(self, batch: Batch, caches: Sequence[Any]) -> Tensor:
        x = torch.sin(batch.input_ids[:, None] * torch.arange(1.0, 1 + (HEADS + 2 * KV_HEADS) * HEAD_DIM))
        heads = (x + 0.1 * batch.positions[:, None]).view(len(x), -1, HEAD_DIM)
        q, k, v = heads[:, :HEADS], heads[:, HEADS:-KV_HEADS], heads[:, -KV_HEADS:]
        self.kernel.store(k, v, caches[0], batch.attention)
        y: Tensor = self.kernel.attend(q, caches[0], batch.attention, 0.2)
        return y.flatten(1).index_select(0, batch.logit_rows)


class Again:
    def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        step()
        return step


def quantized() -> tuple[Any, Any]:
    return QuantizedTriton(SPLIT, BLOCK), cache_of(codec_of((4.0, 4.0), window=9, num_sinks=0))


def plain() -> tuple[Any, Any]:
    pages = torch.zeros(8, *page_shape(KV_HEADS, PAGE_SIZE, HEAD_DIM), dtype=torch.float16)
    return F16Triton(SPLIT, BLOCK), pages


@pytest.mark.parametrize("made", [plain, quantized])
def test_recorded_steps_give_what_steps_give(made: Callable[[], tuple[Any, Any]]) -> None:
    """Bugs: a context length, a number of parts or a table that was frozen when the step was recorded; a padding row
    that is stored; rows of padding among the logits."""
    (kernel, cache), (_, other) = made(), made()
    has_recent = made is quantized
    model = OneLayer(kernel)
    graphs = GraphRunner(model, [cache], Again(), [Size(2, 40), Size(3, 48)], PAGE_SIZE, has_recent)
    graphs.prepare(max_batch_tokens=3)
    eager = Runner(model, [other])

    def both(*rows: BatchRow) -> None:
        found, expected = (runner.run(build_batch(rows)) for runner in (graphs, eager))
        assert torch.equal(found, expected)

    def row(pages: list[int], start: int, ids: list[int]) -> BatchRow:
        stop, recent = start + len(ids), {}
        if has_recent:
            recent = {at: 2 * pages[0] + at % 2 for at in range(max(0, start - 15) // 16, -(-stop // 16))}
        return BatchRow(ids, start, pages, PAGE_SIZE, 1, recent)

    both(row([3, 1, 5], 0, list(range(39))), row([2], 0, [7, 8]))  # a prompt: as it is
    both(row([3, 1, 5], 39, [9]), row([2], 2, [4]))
    both(row([2], 3, [6]))  # beside a row of padding
    both(row([3, 1, 5], 40, [5]), row([2], 4, [6]))  # too long for the first graph


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # NumPy's, of a step without its window
def test_an_engine_that_launches_recorded_steps_ahead() -> None:
    """Two sequences, one of which ends unforeseen, on a device that computes nothing until it must, beside steps that
    are read at once. Bugs: a table, a tile or an id of the step after; a recent page that is gone."""
    requests = [
        submit("ends", list(range(2, 15)), max_tokens=9, temperature=1.0, seed=1, stop_token_ids=(50,)),
        submit("goes on", [5, 6], max_tokens=7, temperature=1.0, seed=2),
    ]
    layout = PageLayout(read_policy("k4v4:w16:s4"), 1, KV_HEADS, HEAD_DIM, PAGE_SIZE)
    old = make_core().parts
    plan = msgspec.structs.replace(old.plan, num_pages=4, num_recent_pages=12)
    model = OneLayer(QuantizedTriton(SPLIT, BLOCK))

    def parts(runner_of: Callable[[Sequence[Any]], Runner]) -> Parts:
        storage = PageStorage(layout, plan.num_pages, torch.device("cpu"), plan.num_recent_pages)
        manager = make_manager(plan, layout, "test")
        return Parts(plan, runner_of(storage.layers), storage, manager, old.sampler, HEADS * HEAD_DIM, (EOS,))

    def recorded(caches: Sequence[Any]) -> Runner:
        runner = GraphRunner(model, caches, Again(), [Size(2, 32)], PAGE_SIZE, has_recent=True)
        runner.prepare(max_batch_tokens=1)
        return runner

    expected = run(EngineCore(parts(lambda caches: Runner(model, caches))), requests)
    ahead = parts(recorded)
    core, device = queued(ahead, OnGpu(), ahead.runner)
    found = run(core, requests)
    for request in requests:
        assert tokens_of(found, request.id) == tokens_of(expected, request.id)
    assert len(tokens_of(found, "ends")) == 5
    assert device.num_overlapped == 6
