"""Decode steps padded to recorded sizes; tests/kernels/interpreted_graphs.py runs them over real kernels."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.batch import Batch, BatchRow, build_batch
from engine.config import Device, EngineConfig, ModelFacts, Plan, resolve
from engine.graphs import GraphRunner, Size, padded, runner_for, size_for, sizes
from engine.runner import Runner


def row(start: int, num_rows: int = 1, pages: Sequence[int] = (3, 1), num_logits: int = 1, **more: Any) -> BatchRow:
    return BatchRow(list(range(start, start + num_rows)), start, list(pages), 16, num_logits, **more)


def plan_of(device: Device) -> Plan:
    return resolve(EngineConfig("model", device=device), ModelFacts(4096, 1000, 0, 10**10, 2, has_cuda=True))


def test_every_step_that_may_come_has_a_size() -> None:
    """Bug: the last sizes left out, so that a full batch at a full context has no graph."""
    made = sizes(6, 5000)
    assert made == [Size(n, length) for n in (1, 2, 4, 6) for length in (2048, 5000)]
    assert sizes(1, 100) == [Size(1, 100)]
    assert size_for(build_batch([row(4999, pages=range(400))] * 6), made) == Size(6, 5000)
    assert size_for(build_batch([row(2047, pages=range(200))] * 3), made) == Size(4, 2048)


@pytest.mark.parametrize(
    "rows",
    [
        [row(5), row(0, 4)],
        [row(5, num_logits=0)],
        [row(5, recent_table={0: 1}, window=40)],
        [row(5)] * 7,
    ],
    ids=["a prompt", "no logits", "a window of its own", "too many"],
)
def test_other_steps_run_as_they_are(rows: list[BatchRow]) -> None:
    assert size_for(build_batch(rows), sizes(6, 5000)) is None


def test_padding_repeats_the_shortest_sequence() -> None:
    """Bug: a padding row that is stored in a page of another sequence."""
    batch = build_batch([row(20), row(3, pages=[2], recent_table={0: 5})])
    step = padded(batch, Size(4, 40), 16, has_recent=True)
    assert step.input_ids.tolist() == [20, 3, 3, 3]
    assert step.attention.context_lens == (21, 4, 4, 4)
    assert step.attention.query_starts == (0, 1, 2, 3, 4)
    assert step.attention.block_tables.tolist() == [[3, 1, 0], [2, 0, 0], [2, 0, 0], [2, 0, 0]]
    assert step.attention.slots.tolist() == [20 % 16 + 16, 35, 35, 35]
    assert step.attention.recent is not None
    assert step.attention.recent.tables.tolist() == [[-1, -1, -1], [5, -1, -1], [5, -1, -1], [5, -1, -1]]
    assert step.attention.recent.slots.tolist() == [-1, 83, 83, 83]


class Sums:
    """Logits are what a GPU's kernels could know: tensors."""

    def forward(self, batch: Batch, caches: Sequence[Any]) -> Tensor:
        known = batch.input_ids + batch.positions * 100 + batch.attention.slots * 10_000
        return known.index_select(0, batch.logit_rows)[:, None].float()


class Again:
    """A recording that reads the tensors which it was made with."""

    def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        step()
        return step


def test_a_step_goes_through_the_recorded_tensors() -> None:
    """Bug: what the graph reads is not what the step says, or padding's logits come back as somebody's."""
    runner = GraphRunner(Sums(), [torch.zeros(1)], Again(), sizes(4, 64), 16, has_recent=False)
    runner.prepare(max_batch_tokens=8)
    for rows in ([row(7)], [row(20), row(3), row(9, pages=[7])], [row(0, 9), row(2)]):
        batch = build_batch(rows)
        expected = Sums().forward(batch, [])
        assert torch.equal(runner.run(batch), expected)


def test_ids_that_are_still_on_the_device_are_read_there() -> None:
    """Bugs: a row that reads the id of the row beside it, padding that reads another one than the sequence it repeats,
    ids of an earlier step; -1 taken for an id."""
    runner = GraphRunner(Sums(), [torch.zeros(1)], Again(), sizes(4, 64), 16, has_recent=False)
    runner.prepare(max_batch_tokens=8)
    ids = torch.tensor([40, 50, -1, 60], dtype=torch.int32)
    starts, pages = (20, 3, 9), ([3, 1], [2], [7])
    rows = [BatchRow([17], start, held, 16, 1) for start, held in zip(starts, pages, strict=True)]
    drawn = [replace(row, place=place) for row, place in zip(rows, (3, 0, 2), strict=True)]
    known = [replace(row, token_ids=[token]) for row, token in zip(rows, (60, 40, 0), strict=True)]
    prompt = row(0, 9)
    for recorded in (runner, Runner(Sums(), runner.caches)):
        assert torch.equal(recorded.run(build_batch(drawn, ids)), Sums().forward(build_batch(known), []))
        mixed, expected = [drawn[0], rows[1]], [known[0], rows[1]]
        assert torch.equal(recorded.run(build_batch(mixed, ids)), Sums().forward(build_batch(expected), []))
        assert torch.equal(
            recorded.run(build_batch([*mixed, prompt], ids)), Sums().forward(build_batch([*expected, prompt]), [])
        )
        assert torch.equal(recorded.run(build_batch(known)), Sums().forward(build_batch(known), []))


def test_logits_outlive_the_next_step() -> None:
    """What the GPU could not draw is drawn from them when the next step is in flight. Bug: every graph puts its logits
    in one place, and hands that out."""
    runner = GraphRunner(Sums(), [torch.zeros(1)], Again(), sizes(4, 64), 16, has_recent=False)
    runner.prepare(max_batch_tokens=8)
    first = runner.run(build_batch([row(7)]))
    kept = first.clone()
    runner.run(build_batch([row(20), row(3)]))
    assert torch.equal(first, kept)


def test_what_cannot_be_recorded_is_said() -> None:
    """Bug: an engine that does not start, or one that is slow and says nothing."""

    class Broken:
        def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
            raise RuntimeError("operation not permitted when stream is capturing")

    def model(name: str) -> Any:
        return SimpleNamespace(layers=[SimpleNamespace(attention=SimpleNamespace(kernel=SimpleNamespace(name=name)))])

    plan, caches = plan_of("cuda"), [torch.zeros(1)]
    _, note = runner_for(model("triton"), caches, plan, Broken)
    assert note is not None
    assert "cannot be recorded: operation not permitted" in note
    _, note = runner_for(model("reference"), caches, plan, Broken)
    assert note is not None
    assert "attention on reference waits for the host" in note
    assert runner_for(model("native"), caches, plan_of("cpu"), Broken)[1] is None
