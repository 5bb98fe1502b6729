"""What an encoder is, and what encoders share: rows at a time, groups, scales as they are stored."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from kernels.linear.weights import LinearWeights

ELEMENTS_AT_ONCE = 1 << 22  # of a matrix in float32: a few temporaries of 16 MiB
SMALLEST_NORMAL_HALF = 2.0**-14
LARGEST_HALF = 65504.0


class ConversionRefused(ValueError):
    """What was asked cannot be done, or not without loss; the message names the layer or the setting."""


class Encoder(Protocol):
    """One method, with its settings."""

    def encode(self, weight: Tensor) -> LinearWeights:
        """weight: [out_features, in_features] floating, finite -> what is stored. Raises ConversionRefused."""
        ...


def by_rows(weight: Tensor, encode: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """`encode` on blocks of rows, its results joined. encode: [rows, K] float32 -> tensors of that many rows."""
    step = max(1, ELEMENTS_AT_ONCE // max(1, weight.shape[1]))
    parts = [encode(block.float()) for block in torch.split(weight, step)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def to_groups(rows: Tensor, group_size: int) -> Tensor:
    """[rows, K] -> [rows, ceil(K / G), G]; a short last group is filled up with zeros."""
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % group_size))
    return padded.view(rows.shape[0], -1, group_size)


def from_groups(groups: Tensor, in_features: int) -> Tensor:
    """[rows, groups, G] -> [rows, in_features]."""
    return groups.flatten(1)[:, :in_features]


def stored_scale(scale: Tensor) -> Tensor:
    """A positive float32 scale as the file will hold it: rounded to float16 where that keeps its digits; 1 for 0."""
    scale = torch.where(scale > 0, scale, 1.0)
    fits = (scale >= SMALLEST_NORMAL_HALF) & (scale <= LARGEST_HALF)
    return torch.where(fits, scale.half().float(), scale)


def narrow(scales: Tensor) -> Tensor:
    """float32 scales -> float16 when every one of them is a float16."""
    half = scales.half()
    return half if torch.equal(half.float(), scales) else scales


def narrow_exactly(scales: Tensor) -> Tensor:
    """In the smaller of the dtypes that hold every scale."""
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(scales.to(dtype).double(), scales.double()):
            return scales.to(dtype)
    return scales.float()
