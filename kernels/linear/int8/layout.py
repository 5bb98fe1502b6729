"""Canonical weights of the int8 family (W8A8, W4A8: compressed-tensors int-quantized).

w[n, k] = scale[n, k // G] * (weight[n, k] - zero[n, k // G]),   multiplied by activations rounded to integers
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.linear.rounding import Rounding

SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Int8Weights:
    """One matrix [N, K] in groups of G input channels, and how its activations are rounded.

    Raises ValueError, naming the field, when sizes disagree or a weight is outside the range of its bits.
    """

    bits: int  # 2..8, of a weight
    group_size: int  # G; the last group may be shorter
    weight: Tensor  # [N, K] int8
    scales: Tensor  # [N, ceil(K / G)] float32, float16 or bfloat16
    zeros: Tensor | None  # likewise int8; None: 0
    rounding: Rounding  # of activations, to integers

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be 2..8, found {self.bits}")
        if self.group_size < 1:
            raise ValueError(f"group_size must be positive, found {self.group_size}")
        if self.weight.ndim != 2 or self.weight.dtype != torch.int8:
            raise ValueError(f"weight must be an int8 matrix, found {self.weight.dtype} {tuple(self.weight.shape)}")
        shape = (self.out_features, self.num_groups)
        for name, tensor, dtypes in (("scales", self.scales, SCALE_DTYPES), ("zeros", self.zeros, (torch.int8,))):
            if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype not in dtypes):
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {shape}")
        if self.rounding.grid != "int":
            raise ValueError(f"activations must be rounded to integers, found {self.rounding.grid}")
        middle = 1 << (self.bits - 1)
        if self.bits < 8 and self.weight.numel():
            lowest, highest = (int(bound) for bound in self.weight.aminmax())
            if lowest < -middle or highest >= middle:
                raise ValueError(f"weights reach from {lowest} to {highest}, beyond the range of {self.bits} bits")

    @property
    def family(self) -> str:
        return "int8"

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def num_groups(self) -> int:
        return -(-self.in_features // self.group_size)

    @property
    def num_bytes(self) -> int:
        parts = [self.weight, self.scales] + ([] if self.zeros is None else [self.zeros])
        return sum(tensor.numel() * tensor.element_size() for tensor in parts)

    def describe(self) -> str:
        size = "row" if self.group_size >= self.in_features else f"g{self.group_size}"
        return f"{self.bits}-bit {size}, {self.rounding.describe()}"

    def dequantize(self) -> Tensor:
        """Return the defining matrix, [N, K] float32."""
        return self.dequantize_rows(0, self.out_features)

    def dequantize_rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of the defining matrix, [stop - start, K] float32, so that callers bound their memory."""
        codes = self.weight[start:stop].float()
        if self.zeros is not None:
            codes = codes - self._per_channel(self.zeros[start:stop])
        return codes * self._per_channel(self.scales[start:stop])

    def _per_channel(self, parameters: Tensor) -> Tensor:
        return parameters.float().repeat_interleave(self.group_size, dim=1)[:, : self.in_features]
