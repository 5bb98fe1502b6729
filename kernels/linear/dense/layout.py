"""Canonical weights of the dense family:  w[n, k] as stored."""

from dataclasses import dataclass

import torch
from torch import Tensor

DENSE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class DenseWeights:
    """One matrix [N, K]. Raises ValueError when it is not a matrix or not of a supported float type."""

    weight: Tensor  # [N, K] float32, float16 or bfloat16

    def __post_init__(self) -> None:
        if self.weight.ndim != 2:
            raise ValueError(f"weight must be a matrix, found shape {tuple(self.weight.shape)}")
        if self.weight.dtype not in DENSE_DTYPES:
            raise ValueError(f"weight must be float32, float16 or bfloat16, found {self.weight.dtype}")

    @property
    def family(self) -> str:
        return "dense"

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def bits(self) -> int:
        return 8 * self.weight.element_size()

    @property
    def group_size(self) -> int:
        return self.in_features

    @property
    def num_bytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()

    def describe(self) -> str:
        return str(self.weight.dtype).removeprefix("torch.")

    def dequantize(self) -> Tensor:
        """[N, K] float32."""
        return self.weight.float()

    def dequantize_rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop, [stop - start, K] float32."""
        return self.weight[start:stop].float()
