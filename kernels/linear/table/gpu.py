"""The table family on NVIDIA GPUs, in Triton (kernels/gpu/linear.py)."""

import torch
from torch import Tensor

from kernels.gpu.codes import byte_table, words_of
from kernels.gpu.multiply import TritonKernel
from kernels.gpu.packing import E2M1, LOOKUP, Packed, pack
from kernels.linear.table import tables
from kernels.linear.table.layout import TableWeights


class TableTriton(TritonKernel):
    """y[t, n] = f sum_g s[n, g] sum_{k in g} x[t, k] table[q[n, k]]

    Ternary and binary codes are multiplied as they are and E2M1 is put together from its bits: both are exact. Other
    tables (NF4, FP4, IQ4_NL) are looked up, their entries rounded to bfloat16. Sums in float32. Scales of MXFP4 and
    NVFP4 are multiplied in before the sums, which is exact as well. From 17 rows on scaled weights are rounded to
    bfloat16 (never by "triton-fixed").

    Reads num_bytes of weights once for up to 64 rows, and 2 T (N + K) bytes of activations; 1 to 3 N K operations to
    unpack and 2 T N K to multiply. Scales of one byte take two; codes that are looked up take 4 bits.
    """

    def prepare(self, weights: TableWeights) -> Packed:
        """Repack as kernels/gpu/packing.py says. Raises ValueError for groups that no plane divides."""
        scales, factor = widened(weights.scales), weights.factor
        if weights.table == tables.TERNARY:
            return pack(weights, scales, center=1, factor=factor)
        if weights.table == tables.BINARY:  # the ternary codes of -1 and 1
            return pack(weights, scales, order=(0, 2), center=1, factor=factor)
        if weights.table == tables.E2M1:
            return pack(weights, scales, E2M1, factor=factor)
        found = byte_table(weights.table)
        table = words_of(found.words).to(weights.codes.device)
        return pack(weights, scales, LOOKUP, found.order, factor=factor, table=table, mixed_table=found.mixed)


def widened(scales: Tensor) -> Tensor:
    """Scales of one byte in bfloat16, which holds all of their values and which every GPU reads."""
    return scales.to(torch.bfloat16) if scales.dtype.itemsize == 1 else scales
