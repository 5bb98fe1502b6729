"""The lookup family on NVIDIA GPUs, in Triton (kernels/gpu/decoded.py)."""

import torch

from kernels.gpu.decoding import TABLES, Decoded, DecodingKernel, pack_halves, plane_of
from kernels.linear.bitstream import unpack_codes
from kernels.linear.lookup.layout import LookupWeights


class LookupTriton(DecodingKernel):
    """y[t, n] = sum_k x[t, k] bf16(table[n, k // G, code[n, k]]),   summed in float32

    Reads num_bytes of codes and tables once for up to 64 rows; N K look-ups, one by one, and 2 T N K operations. Codes
    of 1 bit take 2; those of 3 bits lie five to 16 bits, as 3.2.
    """

    def prepare(self, weights: LookupWeights) -> Decoded:
        """Repack into half-words. Raises ValueError for groups that no plane divides."""
        group, width, bits = min(weights.group_size, weights.in_features), weights.in_features, max(2, weights.bits)
        plane = plane_of(TABLES, width, group)
        return Decoded(
            kind=TABLES,
            bits=bits,
            in_features=width,
            group_size=group,
            plane=plane,
            codes=pack_halves(unpack_codes(weights.codes, weights.bits, width), bits, plane),
            book=weights.tables.contiguous(),
            scales=torch.ones(1, 1, device=weights.codes.device),
            rows_per_scale=weights.out_features,
        )
