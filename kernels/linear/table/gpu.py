"""The table family on NVIDIA GPUs, in Triton (kernels/gpu/linear.py)."""

import torch
from torch import Tensor

from kernels.gpu.multiply import TritonKernel
from kernels.gpu.packing import E2M1, LINEAR, LOOKUP, STORED_BITS, Packed, pack
from kernels.linear.table import tables
from kernels.linear.table.layout import TableWeights


class TableTriton(TritonKernel):
    """y[t, n] = f sum_g s[n, g] sum_{k in g} x[t, k] table[q[n, k]]

    Ternary codes are multiplied as they are and E2M1 is put together from its bits: both are exact. Other tables (NF4,
    FP4, binary) are looked up, their entries rounded to bfloat16. Sums in float32. From 17 rows on scaled weights are
    rounded to bfloat16 (never by "triton-fixed").

    Reads num_bytes of weights once for up to 64 rows, and 2 T (N + K) bytes of activations; 1 to 6 N K operations to
    unpack and 2 T N K to multiply. Scales of one byte take two.
    """

    def prepare(self, weights: TableWeights) -> Packed:
        """Repack into plane-major half-words. Raises ValueError for groups that no plane divides."""
        meaning, center = meaning_of(weights.table)
        table = None
        if meaning == LOOKUP:
            entries = weights.table + (0.0,) * ((1 << STORED_BITS[weights.bits]) - len(weights.table))
            table = torch.tensor(entries, dtype=torch.bfloat16, device=weights.codes.device)
        scales = widened(weights.scales)
        return pack(weights, scales, meaning, center=center, factor=weights.factor, table=table)


def meaning_of(table: tuple[float, ...]) -> tuple[int, int]:
    """(meaning, center): what a code is worth."""
    if table == tables.TERNARY:
        return LINEAR, 1
    if table == tables.E2M1:
        return E2M1, 0
    return LOOKUP, 0


def widened(scales: Tensor) -> Tensor:
    """Scales of one byte in the narrowest type that holds all of their values and that every GPU reads."""
    exact = {torch.float8_e8m0fnu: torch.bfloat16, torch.float8_e4m3fn: torch.float16}
    return scales.to(exact.get(scales.dtype, scales.dtype))
