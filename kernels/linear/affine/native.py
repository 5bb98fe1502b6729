"""The affine family in C++, with activations rounded to 8 bits (kernels/native/linear.hpp) or as they are (exact.hpp).

Both read the same packed weights.
"""

from typing import TYPE_CHECKING

import torch

from kernels import native
from kernels.linear.affine.layout import AffineWeights
from kernels.linear.bitstream import unpack_codes
from kernels.linear.joined import FloatKernel, RoundingKernel

if native.MISSING is None or TYPE_CHECKING:
    from kernels.native import _native


class AffineNative(RoundingKernel):
    """y[t, n] = sum_j x_scale[t, j] (s[n, j] (sum_{k in j} q[n, k] a[t, k] - z[n, j] A[t, j]) + o[n, j] A[t, j])
    A[t, j] = sum_{k in j} a[t, k]

    where j are blocks of at most 128 channels inside the groups, and a = round(x / x_scale), x_scale = max |x| / 127 of
    a token's block. The inner sums are exact integers; the outer one runs in order, so that a result is the same to
    the last bit for any batch, any number of threads and any instruction set.

    Reads num_bytes of weights once for up to 8 tokens; 2 T N K integer operations.
    """

    def prepare(self, weights: AffineWeights) -> "_native.Packed":
        return pack(weights)


class AffineNativeFloat(FloatKernel):
    """y[t, n] = sum_j s[n, j] sum_{k in j} x[t, k] (q[n, k] - z[n, j]),  j the same blocks
    y[t, n] = sum_j sum_{k in j} x[t, k] (s[n, j] q[n, k] + o[n, j])       of weights with offsets

    Activations are not rounded. Both sums run in order in float32: a result has the same bits for any batch, any number
    of threads and any instruction set.

    Reads num_bytes of weights once for up to 4 tokens; 2 T N K operations, and 3 to 5 for each weight to unpack it.
    """

    def prepare(self, weights: AffineWeights) -> "_native.Packed":
        return pack(weights)


def pack(weights: AffineWeights) -> "_native.Packed":
    """Repack into blocks of 16 rows. Codes of 1 and 7 bits take 2 and 8.

    Raises ValueError for groups without a packed form.
    """
    first = weights.zeros.flatten()[0] if weights.zeros.numel() else torch.tensor(0)
    constant = weights.zeros.dtype == torch.uint8 and bool((weights.zeros == first).all())
    zeros = weights.zeros.contiguous() if weights.zeros.dtype == torch.uint8 else weights.zeros.float().contiguous()
    bits, codes = weights.bits, weights.codes.contiguous()
    if bits == 7:
        bits, codes = 8, unpack_codes(codes, bits, weights.in_features)
    nested = weights.nested
    if nested is not None:
        return _native.pack(
            bits,
            weights.in_features,
            weights.group_size,
            codes,
            nested.scales,
            zero=int(first),
            offsets=nested.offsets,
            scale_steps=nested.scale_steps,
            offset_steps=nested.offset_steps,
        )
    return _native.pack(
        bits,
        weights.in_features,
        weights.group_size,
        codes,
        weights.scales.contiguous(),
        None if constant else zeros,
        int(first) if constant else 0,
        offsets=None if weights.offsets is None else weights.offsets.float().contiguous(),
    )
