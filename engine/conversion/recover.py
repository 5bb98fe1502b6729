"""Exact codes from weights that were rounded to a grid but saved as floats, "fake-quantized", as papers' code does.

A group of such weights has few distinct values, whatever the method. For every group size the distinct values of each
(row, group) are found (distinct.py) and written in the cheapest exact form (forms.py); where there are more than 16, up
to 256 steps of a uniform grid are (grids.py). The group size of the fewest bits wins. A few rows decide in which order
sizes are tried on the whole matrix.
"""

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor

from engine.conversion.distinct import MAX_VALUES, find_distinct, most_distinct
from engine.conversion.encoder import ConversionRefused
from engine.conversion.forms import Terms, best_terms
from engine.conversion.grids import MAX_STEPS, as_grid
from kernels.linear.weights import LinearWeights

GROUP_SIZES = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096)
SAMPLED_ROWS = 16
GRID_BITS = 9  # of a weight: where tables take more, a grid may take less


@dataclass(frozen=True)
class Recovery:
    """The encoder that changes nothing."""

    def encode(self, weight: Tensor) -> LinearWeights:
        """Raises ConversionRefused when no group size leaves 16 values or a grid in every group, in fewer bits."""
        best = _best(weight, as_tables)
        if best is None or best[0] > GRID_BITS:
            found = filter(None, (best, _best(weight, as_grid)))
            best = min(found, default=None, key=itemgetter(0))
        if best is None:
            raise ConversionRefused(_reason(weight))
        return LinearWeights(best[1])


def _best(weight: Tensor, way: Callable[[Tensor, int], Terms | None]) -> tuple[float, Terms] | None:
    """The fewest bits a weight, and the terms that take them; None when no group size gives any."""
    rows = torch.linspace(0, weight.shape[0] - 1, min(SAMPLED_ROWS, weight.shape[0])).long()
    sampled = {
        size: bits
        for size in _sizes(weight.shape[1])
        if (bits := _bits(way(weight[rows], size), weight[rows])) is not None
    }
    best: tuple[float, Terms] | None = None
    for size in sorted(sampled, key=lambda size: sampled[size]):
        if best is not None and sampled[size] >= best[0]:
            break  # whole matrices cost no less than their sample
        terms = way(weight, size)
        bits = _bits(terms, weight)
        if terms is not None and bits is not None and (best is None or bits < best[0]):
            best = bits, terms
    return best


def _sizes(in_features: int) -> list[int]:
    """The usual sizes, and what divides a row."""
    divisors = {size for size in range(GROUP_SIZES[0], in_features) if in_features % size == 0}
    return sorted(divisors | {size for size in GROUP_SIZES if size < in_features} | {in_features})


def as_tables(weight: Tensor, group_size: int) -> Terms | None:
    """None when a group has more than 16 values."""
    found = find_distinct(weight, group_size)
    return None if found is None else best_terms(found)


def _bits(terms: Terms | None, weight: Tensor) -> float | None:
    """Bits a weight; None when there are no terms, or it saves nothing: 16 channels always have at most 16 values."""
    if terms is None:
        return None
    bits = 8 * sum(term.num_bytes for term in terms) / weight.numel()
    return bits if bits < 8 * weight.element_size() else None


def _reason(weight: Tensor) -> str:
    size = min(GROUP_SIZES[1], weight.shape[1])
    count, row = most_distinct(weight, size)
    return (
        f"its weights are not rounded to at most {MAX_VALUES} values in a group, nor to a grid of {MAX_STEPS} steps: "
        f"row {row} has {count} different ones in a group of {size} channels. If this layer was meant to stay as it "
        "is, name it with --keep; to quantize the checkpoint now, use --scheme"
    )
