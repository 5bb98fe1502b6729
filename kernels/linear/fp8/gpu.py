"""The fp8 family on NVIDIA GPUs, in Triton (kernels/gpu/decoded.py)."""

import torch

from kernels.gpu.decoding import E4M3, Decoded, DecodingKernel, pack_halves, plane_of
from kernels.linear.fp8.layout import Fp8Weights


class Fp8Triton(DecodingKernel):
    """y[t, n] = sum_b scale[n // R, b] sum_{k in b} x[t, k] weight[n, k],   b blocks of C channels

    Weights become bfloat16, which is exact, for any GPU; sums are float32. Activations are taken as they are. Where the
    format rounds them that is done before: to a code times a scale, and that to bfloat16.

    Reads num_bytes of weights once for up to 64 rows; 3 N K operations to decode and 2 T N K to multiply.
    """

    def prepare(self, weights: Fp8Weights) -> Decoded:
        """Repack two channels to half a word. Raises ValueError for blocks that no plane divides."""
        group, width = min(weights.block[1], weights.in_features), weights.in_features
        plane = plane_of(E4M3, width, group)
        scales = weights.scales
        if scales.dtype == torch.float8_e8m0fnu:
            scales = scales.to(torch.bfloat16)  # exactly
        return Decoded(
            kind=E4M3,
            bits=8,
            in_features=width,
            group_size=group,
            plane=plane,
            codes=pack_halves(weights.weight.view(torch.uint8), 8, plane),
            book=scales,
            scales=scales.T.contiguous(),
            rows_per_scale=weights.block[0],
        )
