"""Weights that lie on a grid of up to 256 steps -> affine codes of up to 8 bits that give every one back, bit for bit.

    dtype(s (q - z)) = v,   z an integer

All values of a group are multiples of its scale, so the smallest magnitude is 1, 2, 3 ... times it, and no more than
leaves the largest below 256 times. Each is tried: the interval of scales that one value allows tells which multiples
the smaller values are; these narrow the interval, which tells those of larger ones.
"""

import torch
from torch import Tensor

from engine.conversion.encoder import by_rows, from_groups, narrow_exactly, to_groups
from engine.conversion.forms import Terms, fitting_scale, rounding_interval
from kernels.linear.affine.layout import AffineWeights
from kernels.linear.bitstream import pack_codes

MAX_STEPS = 256
PASSES = 6  # a scale known to 2^-9, from one bfloat16, takes 3 until values of 127 times it are no longer ambiguous


class _NoGrid(Exception):
    """A group has none."""


def as_grid(weight: Tensor, group_size: int) -> Terms | None:
    """None when the weights of a group are not on a grid with an integer zero point."""

    def rows_of(rows: Tensor) -> tuple[Tensor, Tensor]:
        groups = to_groups(rows + 0.0, group_size)  # [rows, groups, G]; a short last one is filled up with zeros
        scales, multiples = _fit(groups.flatten(0, 1), weight.dtype)
        if bool(scales.isnan().any()):
            raise _NoGrid
        return from_groups(multiples.view(groups.shape), rows.shape[1]).short(), scales.view(groups.shape[:2])

    try:
        multiples, scales = by_rows(weight, rows_of)
    except _NoGrid:
        return None
    ranges = to_groups(multiples, group_size)
    low, high = ranges.amin(-1).clamp(max=0), ranges.amax(-1).clamp(min=0)  # [rows, groups]
    bits = max(1, int((high - low).max()).bit_length())
    half = 1 << bits - 1
    if int(low.min()) >= -half and int(high.max()) < half:
        zeros = torch.tensor([[half]], dtype=torch.uint8).expand(scales.shape)
    else:
        zeros = (-low).to(torch.uint8)
    spread = zeros.short().repeat_interleave(group_size, dim=1)[:, : weight.shape[1]]
    codes = pack_codes((multiples + spread).to(torch.uint8), bits)
    return (AffineWeights(bits, weight.shape[1], group_size, codes, narrow_exactly(scales), zeros),)


def _fit(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """values: [groups, G] float32 -> scales [groups] float64, NaN where there is none, and multiples [groups, G]."""
    magnitude = values.abs()
    smallest = torch.where(magnitude > 0, magnitude, torch.inf).amin(-1)  # [groups]; inf for a group of zeros
    most = torch.where(smallest.isinf(), 1.0, (MAX_STEPS - 1) * smallest / magnitude.amax(-1) * (1 + 2**-7))
    scales = torch.full(smallest.shape, torch.nan, dtype=torch.float64)
    multiples = torch.zeros_like(values)
    if bool((most < 1).any()):
        return scales, multiples
    times = 1
    while len(left := (scales.isnan() & (most >= times)).nonzero().flatten()):
        scales[left], multiples[left] = _try(values[left], smallest[left], times, dtype)
        if bool((scales.isnan() & (most < times + 1)).any()):
            break  # a group has none, and one is enough
        times += 1
    return scales, multiples


def _try(values: Tensor, smallest: Tensor, times: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A scale for each group of which `smallest` is so many times, NaN where none fits.  values [groups, G], smallest
    [groups]."""
    unit = torch.where(smallest.isinf(), 1.0, smallest).unsqueeze(-1)  # [groups, 1]
    lowest, highest = (bound / times for bound in rounding_interval(unit, dtype))  # of the scale
    low, high = rounding_interval(values.abs(), dtype)
    for _ in range(PASSES):
        first, last = (low / highest).ceil(), (high / lowest).floor()  # the multiples that each value may be
        sure = (first == last) & (first > 0)
        lowest = torch.maximum(lowest, torch.where(sure, low / first, 0.0).amax(-1, keepdim=True))
        highest = torch.minimum(highest, torch.where(sure, high / first, torch.inf).amin(-1, keepdim=True))
    multiples = (values.double() / ((lowest + highest) / 2)).round()
    found = fitting_scale(values, dtype, multiples)
    steps = multiples.amax(-1).clamp(min=0) - multiples.amin(-1).clamp(max=0)
    return torch.where(steps < MAX_STEPS, found, torch.nan), multiples.float()
