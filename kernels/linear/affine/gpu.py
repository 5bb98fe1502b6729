"""The affine family on NVIDIA GPUs, in Triton (kernels/gpu/linear.py)."""

import torch
from torch import Tensor

from kernels.gpu.multiply import TritonKernel
from kernels.gpu.packing import BIAS, Packed, Steps, pack
from kernels.linear.affine.layout import AffineWeights, Nested


class AffineTriton(TritonKernel):
    """y[t, n] = sum_g s[n, g] sum_{k in g} x[t, k] (q[n, k] + 128) + c[n, g] sum_{k in g} x[t, k]
    c[n, g] = o[n, g] - s[n, g] (z[n, g] + 128)

    The sums in g are on tensor cores, of exact integers; all are in float32. From 17 rows on the whole weight is
    rounded to bfloat16 instead (never by "triton-fixed"). Codes of 8 bits have the middle taken off in place of 128.

    Reads num_bytes of weights once for up to 64 rows, and 2 T (N + K) bytes of activations; N K operations to unpack
    and 2 T N K to multiply. Codes of 1 bit take 2, of 5 to 7 bits 8; those of 3 bits lie five to 16 bits, as 3.2.
    """

    def prepare(self, weights: AffineWeights) -> Packed:
        """Repack into plane-major half-words. Raises ValueError for groups that no plane divides."""
        zero, nested = constant_zero(weights), weights.nested
        scales, offsets = weights.scales, weights.offsets
        if nested is not None:
            scales, offsets = nested.scales, nested.offsets
        return pack(
            weights,
            scales,
            zeros=zeros_of(weights) if zero is None else None,
            offsets=None if offsets is None else offsets.T.contiguous(),
            steps=None if nested is None else steps_of(nested),
            center=1 << (weights.bits - 1) if zero is None else zero,
        )


def steps_of(nested: Nested) -> Steps:
    """The steps, [num_steps, N]."""
    offsets = None if nested.offset_steps is None else nested.offset_steps.T.contiguous()
    ratio = nested.scales.shape[1] // nested.scale_steps.shape[1]
    return Steps(ratio, nested.scale_steps.T.contiguous(), offsets)


def constant_zero(weights: AffineWeights) -> int | None:
    """The zero point of all groups, when it is one integer that a code can be."""
    zeros = weights.zeros
    if zeros.dtype != torch.uint8 or not zeros.numel() or not bool((zeros == zeros[0, 0]).all()):
        return None
    zero = int(zeros[0, 0])
    return zero if zero < 1 << weights.bits else None


def zeros_of(weights: AffineWeights) -> Tensor:
    """[num_groups, N]; of bytes 128 and a zero point are to be a bfloat16, and others are float16."""
    zeros = weights.zeros.T.contiguous()
    is_far = zeros.dtype == torch.uint8 and weights.bits < 8 and bool((zeros >= BIAS).any())
    return zeros.half() if is_far else zeros
