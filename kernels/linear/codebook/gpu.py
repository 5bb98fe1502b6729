"""The codebook family on NVIDIA GPUs, in Triton (kernels/gpu/decoded.py)."""

import torch

from kernels.gpu.decoding import BOOK, Decoded, DecodingKernel, plane_of
from kernels.linear.codebook.layout import CodebookWeights


class CodebookTriton(DecodingKernel):
    """y[t, n] = sum_g scale[n, g] sum_{k in g} x[t, k] bf16(book[code[n, k // d], k % d])

    A vector is loaded at once, 8 or 16 bytes. A book of 256 vectors stays in the first cache. One of 65,536 is 1 MiB:
    it stays in the second, which hands out 32 bytes for each vector of 8 channels, as many as a row of bfloat16 takes,
    so that such a matrix is read no faster than if it were dense and in that cache.

    Reads num_bytes of codes, book and scales once for up to 64 rows; N K / d look-ups and 2 T N K operations.
    """

    def prepare(self, weights: CodebookWeights) -> Decoded:
        """Raises ValueError for groups that no plane divides."""
        group, vector = min(weights.group_size, weights.in_features), weights.vector_size
        plane = plane_of(BOOK, weights.in_features, group)
        codes = torch.nn.functional.pad(weights.codes, (0, -weights.codes.shape[1] % (plane // vector)))
        return Decoded(
            kind=BOOK,
            bits=weights.bits,
            in_features=weights.in_features,
            group_size=group,
            plane=plane,
            codes=codes.contiguous(),
            book=weights.book.to(torch.bfloat16).contiguous(),
            scales=weights.scales.T.contiguous(),
            rows_per_scale=1,
        )
