"""Low-rank pairs: the best approximation of rank r in the Frobenius norm.

    W = U S V^T,   A = U_r sqrt(S_r) [N, r],   B = sqrt(S_r) V_r^T [r, K],   r = floor(p / 100 * N K / (N + K))

A and B take p percent of the bytes of W. This is ASVD (arXiv:2312.05821) without its scaling by activations: a method
that has calibration data writes other factors of the same form.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.linear.lowrank.layout import LowRankWeights
from kernels.linear.weights import LinearWeights


@dataclass(frozen=True)
class LowRank:
    """The encoder."""

    percent: int = 90

    def __post_init__(self) -> None:
        if not 1 <= self.percent <= 100:
            raise ValueError(f"lowrank keeps 1 to 100 percent, found p{self.percent}")

    def encode(self, weight: Tensor) -> LinearWeights:
        num_rows, num_columns = weight.shape
        rank = max(1, int(self.percent / 100 * num_rows * num_columns / (num_rows + num_columns)))
        u, s, vt = torch.linalg.svd(weight.float(), full_matrices=False)
        root = s[:rank].sqrt()
        stored = weight.dtype
        return LinearWeights((LowRankWeights((u[:, :rank] * root).to(stored), (root[:, None] * vt[:rank]).to(stored)),))
