"""Draws for a whole step on NVIDIA GPUs, in Triton (kernels/gpu/sampling.py)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.contract import Filters, RowDraw, RowSpec
from kernels.gpu import device_refusal
from kernels.gpu.checks import check_memory

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
    ids: Tensor  # [num_draws] int32, -1 where there is none


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
    depend on the others.
    """

    name = "triton"

    def __init__(self, piece: int = PIECE, room: int = ROOM) -> None:
        self._piece, self._room = piece, room

    def refuses(self, spec: RowSpec) -> str | None:
        if spec.width > PIECES * self._piece:
            return f"a vocabulary of {spec.width:,} ids is above {PIECES * self._piece:,}"
        return device_refusal(spec.device)

    def draw_all(self, logits: Tensor, draws: Sequence[RowDraw]) -> Tensor:
        """logits: [num_rows, vocab] float32 -> [num_draws] int32. Raises ValueError for a row that there is not."""
        return self._drawn(logits, draws).ids

    def log_probs_all(
        self, logits: Tensor, rows: Sequence[int], tokens: Sequence[int], num_top: int
    ) -> list[tuple[float, list[tuple[int, float]]] | None]:
        """x[token] - max x - log sum_i exp(x[i] - max x), likewise of the most likely ids; in float64.

        logits: [num_rows, vocab] float32. Costs what a draw with top_k does, and waits for the device.
        """
        num_top = min(num_top, logits.shape[1])
        drawn = self._drawn(logits, [RowDraw(row, Filters(1.0, top_k=num_top)) for row in rows])
        is_found = (drawn.ids >= 0)[:, None]
        top = torch.where(is_found, drawn.rooms[:, :num_top] & 0xFFFFFFFF, 0)
        ids = torch.cat((torch.tensor(tokens).to(top)[:, None], top), 1)  # [num_rows, 1 + num_top]
        normalizer = drawn.best.amax(1).double() + drawn.sums.sum(1).log()
        values = logits[torch.tensor(rows).to(logits.device)[:, None], ids].double() - normalizer[:, None]
        found = zip(is_found[:, 0].tolist(), ids.tolist(), values.tolist(), strict=True)
        return [
            (own[0], list(zip(near[1:], own[1:], strict=True))) if is_here else None for is_here, near, own in found
        ]

    def _drawn(self, logits: Tensor, draws: Sequence[RowDraw]) -> Results:
        from kernels.gpu import sampling

        check_memory("logits", logits, logits, torch.float32)
        num_rows, vocab = logits.shape
        if outside := [draw.row for draw in draws if not 0 <= draw.row < num_rows]:
            raise ValueError(f"there is no row {outside[0]} in logits of {num_rows} rows")
        logits, num_draws, num_pieces = logits.contiguous(), len(draws), -(-vocab // self._piece)
        ids = logits.new_empty(num_draws, dtype=torch.int32)
        rules = torch.tensor([fields_of(draw, vocab) for draw in draws], dtype=torch.float64)
        fields = rules.to(logits.device, non_blocking=True)  # logits are still being computed: launch behind them
        best = logits.new_empty(num_draws, num_pieces)
        first, sums = torch.empty_like(best, dtype=torch.int32), torch.empty_like(best, dtype=torch.float64)
        counts = logits.new_empty(num_draws, num_pieces, BUCKETS, dtype=torch.int32)
        rooms = logits.new_empty(num_draws, self._room, dtype=torch.int64)
        results = Results(best, sums, rooms, ids)
        if not num_draws:
            return results
        sizes = constants(self._piece, self._room)
        grid = (num_pieces, num_draws)
        sampling.largest[grid](logits, fields, best, first, vocab, **sizes["largest"], num_warps=NUM_WARPS)
        if any(draw.filters is not None for draw in draws):
            sampling.weigh[grid](logits, fields, best, sums, counts, vocab, **sizes["weigh"], num_warps=NUM_WARPS)
        sampling.pick[(num_draws,)](
            logits, fields, best, first, sums, counts, rooms, ids, vocab, **sizes["pick"], num_warps=NUM_WARPS
        )
        return results


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
