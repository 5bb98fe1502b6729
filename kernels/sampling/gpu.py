"""Draws for a whole step on NVIDIA GPUs, in Triton (kernels/gpu/sampling.py)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.contract import Filters, RowDraw, RowSpec, Scores
from kernels.gpu import device_refusal
from kernels.gpu.checks import check_memory
from kernels.sampling.edits import edited_rows
from kernels.transfer import send

PIECE = 4096  # ids of a program
PIECES = 64  # of a row, at most: one program puts their results together
BUCKETS = 128  # of weights; the last one is what weighs less than e^-520 of the largest
ROOM = 2048  # ids that one program sorts; twice as many make a thread spill 88 bytes of registers
NUM_WARPS = 8


@dataclass(frozen=True)
class Results:
    """What the kernels leave of draws, on the device."""

    best: Tensor  # [num_draws, num_pieces] float32, the largest logit of each piece
    sums: Tensor  # [num_draws, num_pieces] float64, of draws that are not greedy: what each piece weighs
    rooms: Tensor  # [num_draws, ROOM] int64, of draws with filters: sort keys, ascending; an id is the low 32 bits


class SamplingTriton:
    """As the reference: the first id, in its order, at which the cumulative weight exceeds `uniform` of what is kept.

    Only the ids that a filter may keep are sorted; counting all by weight finds them. With more than ROOM, as in a row
    with NaN or whose largest is not finite, the id is -1.

    It is the reference's id but for rounding. An exponential is within 1 ulp, as the reference's is; sums of n of them
    round n - 1 times, here in the order of a tree, and so does the whole that `uniform` and top_p are shares of. A
    running sum is therefore compared as the exact one would be unless it is within (n + 3) 2^-52 of the whole of its
    target, on either side: only there may the two draw different ids or keep one more by top_p; by min_p, where a
    weight is within 2^-51 of it.

    Reads the logits once to take the largest, twice to draw, and once more where candidates lie: 4 bytes an id each
    time. 36 operations in float64 an id of a draw; ROOM log2(ROOM)^2 / 2 comparisons to sort. A draw's result does not
    depend on the others. A row with edits is copied and edited first (edits.py).
    """

    name = "triton"

    def __init__(self, piece: int = PIECE, room: int = ROOM) -> None:
        self._piece, self._room = piece, room

    def refuses(self, spec: RowSpec) -> str | None:
        if spec.width > PIECES * self._piece:
            return f"a vocabulary of {spec.width:,} ids is above {PIECES * self._piece:,}"
        return device_refusal(spec.device)

    def draw_all(self, logits: Tensor, draws: Sequence[RowDraw], before: Tensor | None = None) -> Tensor:
        """logits: [num_rows, vocab] float32 -> [num_draws] int32. Raises ValueError for a row that there is not."""
        logits = _checked(logits, [draw.row for draw in draws])
        ids = logits.new_empty(len(draws), dtype=torch.int32)
        plain = [i for i, draw in enumerate(draws) if draw.edits is None]
        edited = [(i, draw.edits) for i, draw in enumerate(draws) if draw.edits is not None]
        if plain:
            self._draw(logits, [draws[i] for i in plain], ids, plain)
        if edited:
            places = [i for i, _ in edited]
            rows = edited_rows(logits, [draws[i].row for i in places], [edits for _, edits in edited], before)
            self._draw(rows, [replace(draws[i], row=row) for row, i in enumerate(places)], ids, places)
        return ids

    def score_all(self, logits: Tensor, pairs: Sequence[tuple[int, int]], tokens: Tensor, num_top: int) -> Scores:
        """x[token] - max x - log sum_i exp(x[i] - max x), likewise of the most likely ids; in float64.

        logits: [num_rows, vocab] float32. Costs what a draw with top_k does.
        """
        rows = [row for row, _ in pairs]
        logits = _checked(logits, rows)
        vocab = logits.shape[1]
        num_top = min(num_top, vocab)
        found = logits.new_empty(len(rows), dtype=torch.int32)
        draws = [RowDraw(row, Filters(1.0, top_k=num_top)) for row in rows]
        drawn = self._draw(logits, draws, found, range(len(rows)))
        (at,) = send([torch.tensor(pairs, dtype=torch.int64).view(-1, 2)], logits.device).tensors
        own = tokens.index_select(0, at[:, 1]).long()
        is_found = (found >= 0) & (own >= 0)
        top = torch.where(is_found[:, None], drawn.rooms[:, :num_top] & 0xFFFFFFFF, 0)
        ids = torch.cat((own.clamp(min=0)[:, None], top), 1)  # [num_rows, 1 + num_top]
        normalizer = drawn.best.amax(1).double() + drawn.sums.sum(1).log()
        values = logits.view(-1)[at[:, :1] * vocab + ids].double() - normalizer[:, None]
        return Scores(torch.cat((torch.where(is_found, own, -1)[:, None], top), 1), values)

    def _draw(self, logits: Tensor, draws: Sequence[RowDraw], ids: Tensor, places: Sequence[int]) -> Results:
        """ids[places[i]] = the id of draws[i], -1 where there is none. ids: int32 on the device, mutated."""
        from kernels.gpu import sampling

        (_, vocab), num_draws = logits.shape, len(draws)
        num_pieces = -(-vocab // self._piece)
        numbers = [(*fields_of(draw, vocab), place) for draw, place in zip(draws, places, strict=True)]
        (fields,) = send([torch.tensor(numbers, dtype=torch.float64)], logits.device).tensors
        best = logits.new_empty(num_draws, num_pieces)
        first, sums = torch.empty_like(best, dtype=torch.int32), torch.empty_like(best, dtype=torch.float64)
        counts = logits.new_empty(num_draws, num_pieces, BUCKETS, dtype=torch.int32)
        rooms = logits.new_empty(num_draws, self._room, dtype=torch.int64)
        if num_draws:
            sizes = constants(self._piece, self._room)
            grid = (num_pieces, num_draws)
            sampling.largest[grid](logits, fields, best, first, vocab, **sizes["largest"], num_warps=NUM_WARPS)
            if any(draw.filters is not None for draw in draws):
                sampling.weigh[grid](logits, fields, best, sums, counts, vocab, **sizes["weigh"], num_warps=NUM_WARPS)
            sampling.pick[(num_draws,)](
                logits, fields, best, first, sums, counts, rooms, ids, vocab, **sizes["pick"], num_warps=NUM_WARPS
            )
        return Results(best, sums, rooms)


def _checked(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """The same, contiguous. Raises ValueError for logits that the kernels cannot read, or a row that there is not."""
    check_memory("logits", logits, logits, torch.float32)
    if outside := [row for row in rows if not 0 <= row < len(logits)]:
        raise ValueError(f"there is no row {outside[0]} in logits of {len(logits)} rows")
    return logits.contiguous()


def constants(piece: int, room: int) -> dict[str, dict[str, int]]:
    """What each kernel is compiled for."""
    weigh = {"PIECE": piece, "PIECES": PIECES, "BUCKETS": BUCKETS}
    return {"largest": {"PIECE": piece}, "weigh": weigh, "pick": weigh | {"ROOM": room}}


def fields_of(draw: RowDraw, vocab: int) -> tuple[float, ...]:
    """A draw as the kernels read it."""
    filters = draw.filters
    if filters is None:
        return (draw.row, 0.0, 0, 1.0, 0.0, 0.0)
    return (draw.row, filters.temperature, min(filters.top_k, vocab), filters.top_p, filters.min_p, draw.uniform)
