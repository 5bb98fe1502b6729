"""Canonical weights of the affine family (GPTQ, AWQ, compressed-tensors pack-quantized, GGUF, ...).

    w[n, k] = scale[n, k // G] * (code[n, k] - zero[n, k // G]) + offset[n, k // G]

Formats that store the smallest weight of a group (Q4_1, Q4_K) have offsets: divided by the scale they would be zero
points only nearly, and not where a group's scale is 0.

Codes of one row are a little-endian bit stream (kernels/linear/bitstream.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.linear.bitstream import MAX_BITS, unpack_codes


@dataclass(frozen=True)
class Nested:
    """Parameters of groups as they were stored, integers that count steps: 20 bits for a group of Q4_K in place of 64.

    scale[n, g] = scale_step[n, g // r] * scales[n, g],   and so offset[n, g];   r groups share a step
    """

    scales: Tensor  # [N, groups] int8
    scale_steps: Tensor  # [N, groups / r] float16
    offsets: Tensor | None = None  # [N, groups] int8
    offset_steps: Tensor | None = None  # [N, groups / r] float16


@dataclass(frozen=True)
class AffineWeights:
    """One matrix [N, K] in groups of G input channels. Raises ValueError, naming the field, when sizes disagree."""

    bits: int  # 1..8
    in_features: int  # K
    group_size: int  # G; the last group may be shorter
    codes: Tensor  # [N, ceil(K * bits / 8)] uint8, little-endian bit stream along K
    scales: Tensor  # [N, ceil(K / G)] float16, bfloat16 or float32
    zeros: Tensor  # [N, ceil(K / G)] uint8, or floating; may be an expanded (stride 0) tensor
    offsets: Tensor | None = None  # [N, ceil(K / G)] float16, bfloat16 or float32; zeros are all 0 then
    nested: Nested | None = None  # the same scales and offsets, for back ends that read fewer bytes with them

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MAX_BITS:
            raise ValueError(f"bits must be 1..{MAX_BITS}, found {self.bits}")
        if self.group_size < 1:
            raise ValueError(f"group_size must be positive, found {self.group_size}")
        num_rows = self.codes.shape[0]
        for name, tensor, width in (
            ("codes", self.codes, -(-self.in_features * self.bits // 8)),
            ("scales", self.scales, self.num_groups),
            ("zeros", self.zeros, self.num_groups),
            ("offsets", self.scales if self.offsets is None else self.offsets, self.num_groups),
        ):
            if tuple(tensor.shape) != (num_rows, width):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {(num_rows, width)}")
        if self.codes.dtype != torch.uint8:
            raise ValueError(f"codes must be uint8, found {self.codes.dtype}")
        if self.offsets is not None and not (self.has_one_zero and self.zeros.eq(0).all()):
            raise ValueError("weights with offsets have no zero points")

    @property
    def family(self) -> str:
        return "affine"

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def num_groups(self) -> int:
        return -(-self.in_features // self.group_size)

    @property
    def has_one_zero(self) -> bool:
        """Whether the format stores no zero points: one number stands for all."""
        return all(stride == 0 or size == 1 for size, stride in zip(self.zeros.shape, self.zeros.stride(), strict=True))

    @property
    def num_bytes(self) -> int:
        zeros = 0 if self.has_one_zero else self.zeros.numel() * self.zeros.element_size()
        offsets = 0 if self.offsets is None else self.offsets.numel() * self.offsets.element_size()
        return self.codes.numel() + self.scales.numel() * self.scales.element_size() + zeros + offsets

    def describe(self) -> str:
        return f"{self.bits}-bit g{self.group_size}" + ("" if self.offsets is None else " with minima")

    def dequantize(self) -> Tensor:
        """Return the defining matrix, [N, K] float32: the product is rounded once, from exact integers, as a sum is."""
        return self.dequantize_rows(0, self.out_features)

    def dequantize_rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of the defining matrix, [stop - start, K] float32, so that callers bound their memory."""
        codes = unpack_codes(self.codes[start:stop], self.bits, self.in_features)  # [rows, K] uint8
        zeros = self._per_channel(self.zeros[start:stop])  # [rows, K] or [rows, groups, 1]
        scales = self._per_channel(self.scales[start:stop])
        offsets = None if self.offsets is None else self._per_channel(self.offsets[start:stop])
        weights = codes.float()
        if self.in_features % self.group_size == 0:
            weights = weights.view(codes.shape[0], self.num_groups, self.group_size)
        weights.sub_(zeros).mul_(scales)
        if offsets is not None:
            weights.add_(offsets)
        return weights.view(codes.shape)

    def _per_channel(self, parameters: Tensor) -> Tensor:
        """[rows, groups] -> float32 that broadcasts over the codes: a view when groups are even, spread otherwise."""
        if self.in_features % self.group_size == 0:
            return parameters.float().unsqueeze(-1)
        spread = parameters.float().repeat_interleave(self.group_size, dim=1)
        return spread[:, : self.in_features]
