"""The affine family on NVIDIA GPUs, in Triton (kernels/gpu/linear.py)."""

import torch

from kernels.contract import LinearSpec
from kernels.gpu.multiply import TritonKernel
from kernels.gpu.packing import STORED_BITS, Packed, pack_words, packed_refusal, plane_of
from kernels.linear.affine.layout import AffineWeights


class AffineTriton(TritonKernel):
    """y[t, n] = sum_g s[n, g] sum_{k in g} x[t, k] (q[n, k] - c) + o[n, g] sum_{k in g} x[t, k]
    o[n, g] = s[n, g] (c - z[n, g]), or the stored offset

    c is the zero point where there is one for all, else the middle of the codes: what is multiplied is an exact small
    integer. Sums in float32; from 65 rows on, weights are rounded to bfloat16 first.

    Reads num_bytes of weights once for up to 64 rows, and 2 T (N + K) bytes of activations; 3 N K operations to unpack
    and 2 T N K to multiply. Codes of 1 bit take 2, of 5 to 7 bits 8; those of 3 bits lie ten to a word, as 3.2.
    """

    def refuses(self, spec: LinearSpec) -> str | None:
        return packed_refusal(spec)

    def prepare(self, weights: AffineWeights) -> Packed:
        """Repack into plane-major words. Raises ValueError for groups that no plane divides."""
        bits = STORED_BITS[weights.bits]
        plane = plane_of(bits, weights.in_features, weights.group_size)
        zero = constant_zero(weights)
        return Packed(
            bits=bits,
            in_features=weights.in_features,
            out_features=weights.out_features,
            group_size=min(weights.group_size, weights.in_features),
            plane=plane,
            words=pack_words(weights.codes, weights.bits, weights.in_features, plane),
            scales=weights.scales.T.contiguous(),
            zeros=weights.zeros.T.contiguous() if zero is None else None,
            offsets=None if weights.offsets is None else weights.offsets.T.contiguous(),
            center=1 << (weights.bits - 1) if zero is None else zero,
        )


def constant_zero(weights: AffineWeights) -> int | None:
    """The zero point of all groups, when it is one integer that a code can be."""
    zeros = weights.zeros
    if zeros.dtype != torch.uint8 or not zeros.numel() or not bool((zeros == zeros[0, 0]).all()):
        return None
    return int(zeros[0, 0])
