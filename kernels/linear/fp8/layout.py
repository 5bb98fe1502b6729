"""Canonical weights of the fp8 family (FP8 checkpoints of DeepSeek, transformers, compressed-tensors, ModelOpt; MXFP8).

    w[n, k] = weight[n, k] * scale[n // R, k // C],   weight in e4m3: 1 sign, 4 exponent and 3 fraction bits

Formats that round activations as well say so beside the weights (kernels/linear/rounding.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e8m0fnu)
NAN = 0x7F  # of e4m3, with either sign


@dataclass(frozen=True)
class Fp8Weights:
    """One matrix [N, K] in blocks of R x C.

    Raises ValueError, naming the field, when sizes disagree or a weight is NaN.
    """

    weight: Tensor  # [N, K] float8_e4m3fn
    scales: Tensor  # [ceil(N / R), ceil(K / C)] of a dtype in SCALE_DTYPES
    block: tuple[int, int]  # R, C; the last blocks may be shorter

    def __post_init__(self) -> None:
        if self.weight.ndim != 2 or self.weight.dtype != torch.float8_e4m3fn:
            raise ValueError(f"weight must be an e4m3 matrix, found {self.weight.dtype} {tuple(self.weight.shape)}")
        if min(self.block) < 1:
            raise ValueError(f"a block must have rows and columns, found {self.block}")
        expected = tuple(-(-size // side) for size, side in zip(self.weight.shape, self.block, strict=True))
        if tuple(self.scales.shape) != expected or self.scales.dtype not in SCALE_DTYPES:
            raise ValueError(f"scales is {self.scales.dtype} {tuple(self.scales.shape)}, expected {expected}")
        if bool((self.weight.view(torch.uint8) & NAN == NAN).any()):
            raise ValueError("weight holds NaN")

    @property
    def family(self) -> str:
        return "fp8"

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def bits(self) -> int:
        return 8

    @property
    def group_size(self) -> int:
        return min(self.block[1], self.in_features)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.weight, self.scales))

    def describe(self) -> str:
        rows, columns = (min(side, size) for side, size in zip(self.block, self.weight.shape, strict=True))
        whole = columns == self.in_features
        kind = ("tensor" if rows == self.out_features else "row") if whole else f"{rows}x{columns}"
        return f"e4m3 {kind}"

    def dequantize(self) -> Tensor:
        """Return the defining matrix, [N, K] float32."""
        return self.dequantize_rows(0, self.out_features)

    def dequantize_rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of the defining matrix, [stop - start, K] float32, so that callers bound their memory."""
        return (
            self.weight[start:stop].float()
            * self.row_scales(start, stop).repeat_interleave(self.block[1], dim=1)[:, : self.in_features]
        )

    def row_scales(self, start: int, stop: int) -> Tensor:
        """The scales of rows start..stop, [stop - start, ceil(K / C)] float32."""
        rows = torch.arange(start, stop, device=self.scales.device) // self.block[0]
        return self.scales.float().index_select(0, rows)
