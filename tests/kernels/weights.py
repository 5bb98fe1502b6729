"""Random weights in canonical form, and what they mean, computed another way."""

import torch
from torch import Tensor

from kernels.linear.affine.layout import AffineWeights
from kernels.linear.bitstream import pack_codes
from kernels.linear.dense.layout import DenseWeights


def random_affine(
    bits: int, in_features: int, out_features: int, group_size: int, scale_dtype: torch.dtype, seed: int
) -> AffineWeights:
    """Codes, scales and integer zero points over their whole range."""
    random = torch.Generator().manual_seed(seed)
    shape = (out_features, -(-in_features // group_size))  # [N, groups]
    codes = torch.randint(0, 2**bits, (out_features, in_features), generator=random, dtype=torch.uint8)
    scales = (torch.rand(shape, generator=random) + 0.1).to(scale_dtype)
    zeros = torch.randint(0, 2**bits, shape, generator=random, dtype=torch.uint8)
    return AffineWeights(bits, in_features, group_size, pack_codes(codes, bits), scales, zeros)


def random_dense(in_features: int, out_features: int, dtype: torch.dtype, seed: int) -> DenseWeights:
    random = torch.Generator().manual_seed(seed)
    return DenseWeights(torch.randn(out_features, in_features, generator=random).to(dtype))


def affine_by_hand(weights: AffineWeights) -> Tensor:
    """scale * (code - zero) in float64, [N, K], codes taken from each row's bytes read as one big integer."""
    rows: list[list[float]] = []
    scales, zeros = weights.scales.double().tolist(), weights.zeros.double().tolist()
    for n, packed in enumerate(weights.codes.tolist()):
        stream = int.from_bytes(bytes(packed), "little")
        row: list[float] = []
        for k in range(weights.in_features):
            code = stream >> k * weights.bits & 2**weights.bits - 1
            group = k // weights.group_size
            row.append(scales[n][group] * (code - zeros[n][group]))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)
