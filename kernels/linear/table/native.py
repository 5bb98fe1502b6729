"""The table family in C++, with activations rounded to 8 bits (kernels/native/linear.hpp) or as they are (exact.hpp).

Both read the same packed weights, but for ternary codes with one scale a row: the former takes them five to a byte.
"""

from typing import TYPE_CHECKING

import torch

from kernels import native
from kernels.linear.joined import FloatKernel, RoundingKernel
from kernels.linear.table.layout import TableWeights
from kernels.linear.table.tables import TERNARY

if native.MISSING is None or TYPE_CHECKING:
    from kernels.native import _native

SCALE_TYPES = {torch.float8_e4m3fn: "e4m3", torch.float8_e8m0fnu: "e8m0"}


class TableNative(RoundingKernel):
    """y[t, n] = f sum_j s[n, j] x_scale[t, j] sum_{k in j} u[n, k] a[t, k]

    where j are blocks of at most 128 channels inside the groups (160 for ternary codes five to a byte), a = round(x /
    x_scale), x_scale = max |x| / 127 of a token's block, and step u = table[code]. Entries that are small multiples of
    a common step are exact (E2M1, FP4, ternary, binary); others (NF4) are rounded to multiples of 1/16383 of the
    largest. The inner sums are exact integers, the outer one runs in order: a result has the same bits for any batch,
    any number of threads and any instruction set.

    Reads num_bytes of weights once for up to 8 tokens; 2 T N K integer operations, twice as many for NF4 and FP4.
    """

    def prepare(self, weights: TableWeights) -> "_native.Packed":
        """Ternary codes with one scale a row lie five to a byte: 1.6 bits in place of 2, as fast on one core."""
        whole_rows = weights.group_size >= weights.in_features
        return pack(weights, five_to_a_byte=is_ternary(weights) and whole_rows)


class TableNativeFloat(FloatKernel):
    """y[t, n] = f sum_j s[n, j] sum_{k in j} x[t, k] table[code[n, k]],  j blocks of at most 128 channels

    Neither activations nor entries are rounded to integers. Both sums run in order in float32: a result has the same
    bits for any batch, any number of threads and any instruction set.

    Reads num_bytes of weights once for up to 4 tokens; 2 T N K operations, and 2 for each weight to look it up.
    """

    def prepare(self, weights: TableWeights) -> "_native.Packed":
        return pack(weights)


def is_ternary(weights: TableWeights) -> bool:
    return weights.table == TERNARY and weights.bits == 2


def pack(weights: TableWeights, *, five_to_a_byte: bool = False) -> "_native.Packed":
    """Repack into blocks of 16 rows. Raises ValueError for groups without a packed form and for scales that are NaN.

    Ternary codes need no table, being their value plus 1. Unpacking five from a byte takes float products twice as
    long as 2 bits do.
    """
    ternary = is_ternary(weights)
    scale_type = SCALE_TYPES.get(weights.scales.dtype)
    scales = weights.scales.contiguous()
    factors = None if weights.factor == 1.0 else torch.full((weights.out_features,), weights.factor)
    return _native.pack(
        weights.bits,
        weights.in_features,
        weights.group_size,
        weights.codes.contiguous(),
        scales if scale_type is None else scales.view(torch.uint8),
        zero=1 if ternary else 0,
        table=None if ternary else weights.table,
        scale_type=scale_type,
        factors=factors,
        ternary=five_to_a_byte,
    )
