"""Canonical weights of the low-rank family (ASVD, SAES-SVD, LoRA):  W = A B.

y = A (B x)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LowRankWeights:
    """One matrix [N, K] of rank r. Raises ValueError, naming the factor, when sizes disagree."""

    a: Tensor  # [N, r] float32, float16 or bfloat16
    b: Tensor  # [r, K] likewise

    def __post_init__(self) -> None:
        for name, factor in (("a", self.a), ("b", self.b)):
            if factor.ndim != 2:
                raise ValueError(f"{name} must be a matrix, found shape {tuple(factor.shape)}")
            if factor.dtype not in FACTOR_DTYPES:
                raise ValueError(f"{name} must be float32, float16 or bfloat16, found {factor.dtype}")
        if self.a.shape[1] != self.b.shape[0]:
            raise ValueError(f"a has rank {self.a.shape[1]}, b has rank {self.b.shape[0]}")

    @property
    def family(self) -> str:
        return "lowrank"

    @property
    def in_features(self) -> int:
        return self.b.shape[1]

    @property
    def out_features(self) -> int:
        return self.a.shape[0]

    @property
    def rank(self) -> int:
        return self.a.shape[1]

    @property
    def bits(self) -> int:
        return 8 * self.a.element_size()

    @property
    def group_size(self) -> int:
        return self.in_features

    @property
    def num_bytes(self) -> int:
        return sum(factor.numel() * factor.element_size() for factor in (self.a, self.b))

    def describe(self) -> str:
        return f"rank {self.rank}"

    def dequantize(self) -> Tensor:
        """A B, [N, K] float32, summed in float64."""
        return (self.a.double() @ self.b.double()).float()

    def a_rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of A, [stop - start, r] float32."""
        return self.a[start:stop].float()

    def b_rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of B, [stop - start, K] float32."""
        return self.b[start:stop].float()
