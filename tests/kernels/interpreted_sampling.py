"""Draws in Triton against the definition, under Triton's interpreter: test_gpu_sampling.py runs this file in a process
of its own. A draw takes it a tenth of a second: rows are short, and pieces of them shorter."""

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.core import EngineCore
from engine.messages import Token
from engine.sampling import Sampler
from kernels.contract import Edits, Filters, RowDraw
from kernels.sampling.gpu import SamplingTriton
from kernels.sampling.reference import SamplingReference
from tests.engine.worlds import make_core, run, submit
from tests.kernels.test_sampling import FILTERS, KINDS, random_row

PIECE = 16  # ids; the shipped kernel has 4,096
REFERENCE = SamplingReference()
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # NumPy's


def expected(logits: Tensor, draw: RowDraw) -> int:
    row = logits[draw.row].clone()
    if draw.edits is not None:
        row[draw.edits.ids] = draw.edits.of(row[draw.edits.ids])
    best = REFERENCE.argmax(row)
    if best is None or draw.filters is None:
        return -1 if best is None else best
    return REFERENCE.draw(row, draw.filters, draw.uniform)


def check(logits: Tensor, draws: list[RowDraw], room: int = 64) -> None:
    """All in one call: other rows, with other rules, stand beside each."""
    found = SamplingTriton(PIECE, room).draw_all(logits, draws).tolist()
    assert found == [expected(logits, draw) for draw in draws]


@pytest.mark.parametrize("size", [5, 45])
def test_draws_are_those_of_the_definition(size: int) -> None:
    """Every kind of row with greedy and a quarter of the filters; the next test has them all. Bugs: a piece's last ids
    beyond the vocabulary drawn, ties in another order, a row drawn by its neighbour's rules, top_k above the
    vocabulary."""
    logits = torch.stack([random_row(size, kind, seed=size) for kind in KINDS])
    draws = [RowDraw(row, None) for row in range(len(KINDS))]
    uniforms = torch.rand(100, generator=torch.Generator().manual_seed(size)).tolist()
    for row in range(len(KINDS)):
        for rules in FILTERS[(row + size) % 4 :: 4]:
            draws.append(RowDraw(row, Filters(**rules), uniforms[len(draws)]))
    draws += [RowDraw(0, Filters(1.0), 0.0), RowDraw(0, Filters(1.0, top_k=3), 1 - 2**-53)]
    check(logits, draws[::-1])


@pytest.mark.parametrize("rules", [*FILTERS, {"temperature": 0.05, "top_k": 40}], ids=str)
def test_candidates_hold_all_that_filters_keep(rules: dict[str, Any]) -> None:
    """Of 300 ids in 5 pieces 64 can be sorted. Bugs: an id that a filter keeps lies beyond the buckets gathered, or one
    of them is stored over another; a low temperature, with which all but a few ids weigh nothing, left to the CPU."""
    logits = torch.stack([random_row(300, "plain", seed) * 2 for seed in (1, 2)])
    draws = [RowDraw(row, Filters(**rules), uniform) for row, uniform in ((1, 0.999), (0, 0.6))]
    found = SamplingTriton(piece=64, room=64).draw_all(logits, draws).tolist()
    is_left = rules["temperature"] > 1 or rules.get("top_k") == 10**6
    assert found == ([-1, -1] if is_left else [expected(logits, draw) for draw in draws])


@pytest.mark.parametrize("rules", [{}, {"top_k": 10**6}, {"top_p": 1 - 1e-9}], ids=str)
def test_only_at_an_edge_may_another_id_be_drawn(rules: dict[str, Any]) -> None:
    """The bound that SamplingTriton derives, on both sides of edges between ids in the order of the draw. Bug: sums in
    float32, which are 2^-24 apart."""
    size, filters = 45, Filters(1.3, **rules)
    row = random_row(size, "plain", seed=4)
    order = row.sort(descending=True, stable=True).indices if rules else torch.arange(size)
    weights = [Fraction(w) for w in ((row.double() - row.max()) / 1.3).exp()[order].tolist()]
    bound, total = Fraction(size + 3, 2**52), sum(weights)
    draws, ids = [], []
    for at in (0, 1, 20, 43):
        edge = sum(weights[: at + 1]) / total
        draws += [RowDraw(0, filters, float(edge + offset)) for offset in (-2 * bound, 2 * bound)]
        ids += [int(order[at]), int(order[at + 1])]
    assert SamplingTriton(PIECE, 64).draw_all(row[None], draws).tolist() == ids
    assert [expected(row[None], draw) for draw in draws] == ids


def test_what_top_p_keeps_is_bounded_likewise() -> None:
    """The last id kept, with top_p on both sides of its edge. Bug: the id that crosses top_p is dropped."""
    row = random_row(45, "plain", seed=4)
    order = row.sort(descending=True, stable=True).indices
    weights = [Fraction(w) for w in (row.double() - row.max()).exp()[order].tolist()]
    bound, total = Fraction(48, 2**52), sum(weights)
    draws, ids = [], []
    for at in (0, 1, 7):
        edge = sum(weights[: at + 1]) / total
        draws += [RowDraw(0, Filters(1.0, top_p=float(edge + side * bound)), 1 - 2**-53) for side in (-2, 2)]
        ids += [int(order[at]), int(order[at + 1])]
    assert SamplingTriton(PIECE, 64).draw_all(row[None], draws).tolist() == ids


def test_top_p_is_a_share_of_what_top_k_leaves() -> None:
    """Of ten equal ids 0.55 are six; of all 45 it would be more than ten."""
    draw = RowDraw(0, Filters(1.0, top_k=10, top_p=0.55), 1 - 2**-53)
    check(torch.zeros(1, 45), [draw])
    assert expected(torch.zeros(1, 45), draw) == 5


def test_zeros_of_either_sign_tie() -> None:
    """Bug: -0 sorted behind 0, because its bits are."""
    row = torch.tensor([-1.0, -0.0, 0.0, -0.0, 0.0])
    check(row[None], [RowDraw(0, None), *(RowDraw(0, Filters(1.0, top_k=4), (i + 0.5) / 4) for i in range(4))])


def test_one_id_is_drawn() -> None:
    filters = (None, Filters(0.5), Filters(0.5, top_k=3), Filters(2.0, top_p=0.0))
    check(torch.tensor([[-3.0]]), [RowDraw(0, rules, 0.7) for rules in filters])


def test_rows_that_are_broken_or_too_flat_are_left_to_the_cpu() -> None:
    """Bugs: NaN, with which every comparison is false, stepped over; ids stored beyond the room; a neighbour's draw
    lost with them."""
    logits = torch.stack([random_row(45, "plain", seed=1) for _ in range(6)])
    logits[1, 44], logits[2, 3] = math.nan, math.inf
    logits[3] = -math.inf
    logits[4] = 1.0
    logits[5, 40], logits[5, 41] = math.nan, math.inf
    greedy = [RowDraw(row, None) for row in range(6)]
    drawn = [RowDraw(row, Filters(1.0, top_k=2), 0.9) for row in range(6)]
    found = SamplingTriton(PIECE, room=32).draw_all(logits, greedy + drawn).tolist()
    assert found[:6] == [expected(logits, greedy[0]), -1, -1, -1, 0, -1]
    assert found[6:] == [expected(logits, drawn[0]), -1, -1, -1, -1, -1]


def edits_of(*edits: tuple[int, float, float, float]) -> Edits:
    ids, *terms = zip(*edits, strict=True)
    return Edits(torch.tensor(ids), torch.tensor(terms, dtype=torch.float32), torch.zeros(len(ids)))


def test_edited_rows_are_copies() -> None:
    """Bugs: a row edited for one draw and read by another one, or scored; edits of the row beside; a banned id drawn; a
    row that NaN makes broken mended by a ban."""
    logits = torch.stack([random_row(45, "plain", seed) for seed in (1, 2, 3)])
    before, (first, second) = logits.clone(), logits[0].topk(2).indices.tolist()
    banned = edits_of((first, 0.0, 1.0, math.inf), (second, 0.5, 1.3, 0.25))
    raised = edits_of((44, 90.0, 1.0, 0.0), (0, -3.0, 2.0, 0.0))
    everything = edits_of(*((i, 0.0, 1.0, math.inf) for i in range(45)))
    draws = [RowDraw(0, None, edits=banned), RowDraw(0, None), RowDraw(2, Filters(0.7), 0.4, raised)]
    draws += [RowDraw(0, Filters(1.0, top_k=5), 0.9, banned), RowDraw(1, None, edits=everything)]
    check(logits, draws)
    assert SamplingTriton(PIECE, 64).draw_all(logits, draws).tolist()[1:3] == [first, 44]
    assert torch.equal(logits, before)
    logits[1, 7] = math.nan
    check(logits, [RowDraw(1, None, edits=edits_of((7, 0.0, 1.0, math.inf)))])


def entries_of(logits: Tensor, rows: list[int], tokens: list[int], num_top: int, room: int = 64) -> list[Any]:
    """(id, value) of each row, its token first; None where it is left."""
    pairs = [(row, len(rows) - 1 - i) for i, row in enumerate(rows)]
    scores = SamplingTriton(PIECE, room).score_all(logits, pairs, torch.tensor(tokens[::-1]).int(), num_top)
    entries = [list(zip(*row, strict=True)) for row in zip(scores.ids.tolist(), scores.values.tolist(), strict=True)]
    return [None if entry[0][0] < 0 else entry for entry in entries]


@pytest.mark.parametrize("num_top", [0, 3, 10**6])
def test_log_probs(num_top: int) -> None:
    """The same ids in the same order, values within the bound of test_sampling.py. Bugs: a filter or a temperature in
    them, ids of the row beside."""
    logits, rows = torch.stack([random_row(45, kind, seed=3) for kind in KINDS]), list(reversed(range(len(KINDS))))
    tokens = [7 * row for row in rows]
    found = entries_of(logits, rows, tokens, num_top)
    for row, token, entry in zip(rows, tokens, found, strict=True):
        expected_own, expected_top = REFERENCE.log_probs(logits[row], token, min(num_top, 45))
        expected_entry = [(token, expected_own), *expected_top]
        assert [near for near, _ in entry] == [near for near, _ in expected_entry]
        bound = 1e-15 * (45 + float(logits[row][logits[row].isfinite()].abs().max()))
        values = [(a[1], b[1]) for a, b in zip(entry, expected_entry, strict=True)]
        assert all(a == b or abs(a - b) <= bound for a, b in values)


def test_log_probs_that_are_left_to_the_cpu() -> None:
    """Bugs: ids read out of a room that was never filled; a token that was not drawn taken for an index."""
    logits = torch.stack([torch.ones(45), random_row(45, "plain", seed=1), random_row(45, "plain", seed=2)])
    logits[2, 20] = math.nan
    flat, plain, broken, absent = entries_of(logits, [0, 1, 2, 1], [3, 4, 5, -1], 2, room=32)
    assert flat is broken is absent is None
    assert plain is not None


def test_what_is_no_draw_is_refused() -> None:
    """Bug: memory read past the end of the logits."""
    kernel = SamplingTriton(PIECE, 64)
    with pytest.raises(ValueError, match="no row 2 in logits of 2 rows"):
        kernel.draw_all(torch.zeros(2, 5), [RowDraw(0, None), RowDraw(2, None)])
    with pytest.raises(ValueError, match="must be float32"):
        kernel.draw_all(torch.zeros(2, 5, dtype=torch.bfloat16), [RowDraw(0, None)])
    assert kernel.draw_all(torch.zeros(2, 5), []).shape == (0,)


def test_an_engine_answers_as_without_it() -> None:
    """Bug: what the runner returns is no memory that the kernel takes, or ids come back as no Python numbers."""
    submits = [submit("greedy", [5, 6], max_tokens=3), submit("drawn", [7], max_tokens=3, temperature=2.0, seed=1, n=2)]

    def tokens(sampler: Sampler) -> list[Token]:
        events = run(EngineCore(replace(make_core().parts, sampler=sampler)), submits)
        return [event for event in events if isinstance(event, Token)]

    found = tokens(Sampler(REFERENCE, SamplingTriton(PIECE, 64)))
    assert len(found) == 9
    assert found == tokens(Sampler(REFERENCE))
