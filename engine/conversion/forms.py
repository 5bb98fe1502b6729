"""The tables of a matrix -> the cheapest form that gives every value back, bit for bit in the checkpoint's own dtype.

    table    dtype(s T[c]) = v            for one of the tables that formats name
    affine   dtype(s (q - z)) = v         integer z
    planes   dtype(a1 t1 + a2 t2) = v     two ternary planes
    lookup   the values themselves

A scale is not guessed: the values that dtype rounds to v are an interval, so each v = dtype(s m) with a known
multiplier m bounds s from both sides, and a scale exists when all intervals of a group meet.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from engine.conversion.distinct import MAX_VALUES, Distinct
from engine.conversion.encoder import narrow_exactly
from kernels.linear.affine.layout import AffineWeights
from kernels.linear.bitstream import pack_codes
from kernels.linear.lookup.layout import LookupWeights
from kernels.linear.table.layout import TableWeights
from kernels.linear.table.tables import BINARY, E2M1, FP4, NF4, TERNARY
from kernels.linear.weights import Term

NAMED_TABLES = (BINARY, TERNARY, E2M1, NF4, FP4)
Terms = tuple[Term, ...]
INTEGERS = tuple(range(1, 16))  # what the smallest magnitude may be a multiple of
INT_DTYPES = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


def best_terms(found: Distinct) -> Terms:
    """Of the fewest bytes; tables of each group's own, which have the slowest kernel, only where nothing else fits."""
    fitting = list(_forms(found))
    return min(fitting, key=lambda terms: sum(term.num_bytes for term in terms)) if fitting else _as_lookup(found)


def _forms(found: Distinct) -> Iterator[Terms]:
    """Every form but tables of a group's own. What the first row refutes, which most do, is not tried on the others."""
    ways: list[Callable[[Distinct], Terms | None]] = [partial(_as_table, table=table) for table in NAMED_TABLES]
    for way in (*ways, _as_affine, _as_planes):
        if way(found.first_row()) is not None and (terms := way(found)) is not None:
            yield terms


def _as_lookup(found: Distinct) -> Terms:
    tables = found.values[..., : 2**found.bits].to(found.dtype)
    codes = pack_codes(found.codes, found.bits)
    lookup = LookupWeights(found.bits, found.in_features, found.group_size, codes, tables)
    return (lookup,)


def _as_table(found: Distinct, table: tuple[float, ...]) -> Terms | None:
    """The largest magnitude of a group is one of the table's: each is tried, the largest first."""
    if found.count > len(table):
        return None
    entries, order = torch.tensor(table).double().sort()
    middles = (entries[1:] + entries[:-1]) / 2
    largest = found.values.abs().amax(-1).double()  # [N, groups]
    scales, codes = torch.full_like(largest, torch.nan), torch.zeros(found.values.shape, dtype=torch.int64)
    for top in sorted({abs(entry) for entry in table}, reverse=True):
        if top == 0 or not bool(scales.isnan().any()):
            continue
        guess = torch.where(largest > 0, largest / top, 1.0).unsqueeze(-1)
        nearest = torch.bucketize(found.values.double() / guess, middles)  # [N, groups, 16]
        scale = fitting_scale(found.values, found.dtype, entries[nearest])
        new = scales.isnan() & ~scale.isnan()
        scales, codes = torch.where(new, scale, scales), torch.where(new.unsqueeze(-1), order[nearest], codes)
    if bool(scales.isnan().any()):
        return None
    bits = max(1, (len(table) - 1).bit_length())
    packed = pack_codes(found.rename(codes.to(torch.uint8)), bits)
    return (TableWeights(bits, found.in_features, found.group_size, packed, narrow_exactly(scales), table),)


def _as_affine(found: Distinct) -> Terms | None:
    """With an integer zero point all values are multiples of the scale, the smallest magnitude 1, 2 ... 15 times it."""
    magnitude = found.values.abs().double()
    smallest = torch.where(magnitude > 0, magnitude, torch.inf).amin(-1)  # [N, groups]
    smallest = torch.where(smallest.isinf(), 1.0, smallest)
    scales, multiples = torch.full_like(smallest, torch.nan), torch.zeros_like(magnitude)
    for times in INTEGERS:
        missing = scales.isnan()
        if not bool(missing.any()):
            break
        m = (found.values.double() / (smallest / times).unsqueeze(-1)).round()
        in_range = (m.amax(-1).clamp(min=0) - m.amin(-1).clamp(max=0)) < MAX_VALUES
        scale = fitting_scale(found.values, found.dtype, m)
        new = missing & in_range & ~scale.isnan()
        scales, multiples = torch.where(new, scale, scales), torch.where(new.unsqueeze(-1), m, multiples)
    if bool(scales.isnan().any()):
        return None
    low, high = multiples.amin(-1).clamp(max=0), multiples.amax(-1).clamp(min=0)
    bits = max(1, int((high - low).max()).bit_length())
    half = 2 ** (bits - 1)
    if int(low.min()) >= -half and int(high.max()) < half:
        zeros = torch.tensor([[half]], dtype=torch.uint8).expand(scales.shape)
    else:
        zeros = (-low).to(torch.uint8)
    codes = found.rename((multiples + zeros.unsqueeze(-1)).to(torch.uint8))
    return (
        AffineWeights(
            bits, found.in_features, found.group_size, pack_codes(codes, bits), narrow_exactly(scales), zeros
        ),
    )


def _as_planes(found: Distinct) -> Terms | None:
    """Both scales are magnitudes that occur: of a1 + a2, a1, a2 and |a1 - a2| every pair is tried."""
    ordered = found.values.abs().sort(-1, descending=True).values
    fresh = torch.nn.functional.pad(ordered.diff(dim=-1) != 0, (1, 0), value=True) & (ordered > 0)
    slot = (fresh.cumsum(-1) - 1).clamp(0, MAX_VALUES - 1)
    table = torch.zeros_like(ordered).scatter_reduce(-1, slot, ordered, "amax")[..., :4]  # [N, groups, 4] falling
    if int(fresh.sum(-1).max()) > 4:
        return None
    shape = found.values.shape[:2]
    scales, codes = torch.full((2, *shape), torch.nan), torch.zeros(2, *found.values.shape, dtype=torch.uint8)
    trits = torch.tensor([(a, b) for a in (-1.0, 0.0, 1.0) for b in (-1.0, 0.0, 1.0)])  # [9, 2]
    for i in range(4):
        for j in range(i + 1, 4):
            pair = table[..., [i, j]]  # [N, groups, 2]
            sums = (pair @ trits.T).to(found.dtype).float()  # [N, groups, 9]
            matches = found.values.unsqueeze(-1) == sums.unsqueeze(-2)  # [N, groups, 16, 9]
            new = matches.any(-1).all(-1) & scales[0].isnan()
            chosen = trits[matches.to(torch.uint8).argmax(-1)] + 1  # [N, groups, 16, 2]
            scales = torch.where(new, pair.movedim(-1, 0), scales)
            codes = torch.where(new[..., None], chosen.movedim(-1, 0).to(torch.uint8), codes)
    if bool(scales.isnan().any()):
        return None
    first, second = (
        TableWeights(
            2,
            found.in_features,
            found.group_size,
            pack_codes(found.rename(code), 2),
            narrow_exactly(scale.double()),
            TERNARY,
        )
        for code, scale in zip(codes, scales, strict=True)
    )
    return first, second


def fitting_scale(values: Tensor, dtype: torch.dtype, multipliers: Tensor) -> Tensor:
    """A scale s for each group with dtype(s m) = v for all its values v and their multipliers m; NaN where none is.

    values: [..., n] float32, multipliers: [..., n] float64 -> [...] float64 that hold a float16 where one fits, else a
    float32.
    """
    v, m = values.double().abs(), multipliers.abs()
    low, high = rounding_interval(values.abs(), dtype)
    same_sign = (values.double() * multipliers > 0) | ((v == 0) & (m == 0))
    bounded = m > 0
    lowest = torch.where(bounded, low / m, -torch.inf).amax(-1)  # [N, groups]
    highest = torch.where(bounded, high / m, torch.inf).amin(-1)
    middle = (lowest + highest) / 2
    middle = torch.where(middle.isfinite(), middle, 1.0)  # a group of zeros
    best = torch.full_like(middle, torch.nan)
    for stored in (torch.float32, torch.bfloat16, torch.float16):
        scale = middle.to(stored)
        product = (scale.float().unsqueeze(-1) * multipliers.float()).to(dtype).float()
        fits = (product == values).all(-1) & same_sign.all(-1)
        best = torch.where(fits, scale.double(), best)
    return best


def rounding_interval(magnitude: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The reals that `dtype` rounds to each magnitude, a number of that dtype; float64."""
    bits = magnitude.to(dtype).view(INT_DTYPES[dtype])
    below = (bits - 1).clamp(min=0).view(dtype).double()
    above = (bits + 1).view(dtype).double()
    exact = magnitude.double()
    return (exact + below) / 2, torch.where(above.isfinite(), (exact + above) / 2, exact)
