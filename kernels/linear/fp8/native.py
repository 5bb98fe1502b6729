"""The fp8 family in C++: e4m3 widened to bfloat16, which is exact, and one product for each block of channels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import native
from kernels.contract import LinearSpec
from kernels.linear.blocks import check_width
from kernels.linear.fp8.layout import Fp8Weights
from kernels.linear.joined import Joined, float_type, multiply

if native.MISSING is None or TYPE_CHECKING:
    from kernels.native import _native


@dataclass(frozen=True)
class Prepared:
    """One matrix, cut where its scales change along the channels."""

    parts: "tuple[_native.DenseMatrix, ...]"  # of `columns` channels each, the last of what is left
    scales: Tensor  # [parts, N] float32
    columns: int
    in_features: int

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts) + 4 * self.scales.numel()


@dataclass(frozen=True)
class PartsJoined:
    """Matrices cut alike: their parts side by side."""

    parts: tuple[Joined, ...]
    scales: tuple[Tensor, ...]  # of each matrix [parts, N]
    columns: int
    in_features: int


class Fp8Native:
    """y[t, n] = sum_b scale[n // R, b] sum_{k in b} x[t, k] weight[n, k],   b blocks of C channels

    Both sums run in order in float32, so that a result has the same bits for any batch, any number of threads and any
    instruction set. Activations are not rounded.

    Reads 2 bytes for each weight, twice what the checkpoint holds, and 4 for each scale of a row, once for up to 6
    tokens; 2 T N K operations, and 2 T N for each block.
    """

    name = "native"

    def refuses(self, spec: LinearSpec) -> str | None:
        return native.refusal(spec.device, spec.dtype)

    def prepare(self, weights: Fp8Weights) -> Prepared:
        """Widen and repack part by part; the tensor is not kept."""
        columns, width = min(weights.block[1], weights.in_features), weights.in_features
        parts = []
        for start in range(0, width, columns):
            part = weights.weight[:, start : start + columns].to(torch.bfloat16).contiguous()
            parts.append(_native.pack_dense(part.data_ptr(), float_type(part), *part.shape))
        scales = weights.row_scales(0, weights.out_features).t().contiguous()
        return Prepared(tuple(parts), scales, columns, width)

    def join(self, prepared: Sequence[Prepared]) -> PartsJoined | None:
        """None when the matrices are cut differently."""
        first = prepared[0]
        if len({(one.columns, one.in_features) for one in prepared}) != 1:
            return None
        rows = tuple(one.scales.shape[1] for one in prepared)
        parts = []
        for of_each in zip(*(one.parts for one in prepared), strict=True):
            parts.append(Joined(_native.DenseGroup(list(of_each)), of_each[0].num_channels, rows))
        return PartsJoined(tuple(parts), tuple(one.scales for one in prepared), first.columns, first.in_features)

    def linear(self, x: Tensor, joined: PartsJoined) -> tuple[Tensor, ...]:
        """x: [num_tokens, K] float32 -> [num_tokens, N] float32 for each matrix."""
        check_width(x, joined.in_features)
        totals: list[Tensor] = []
        for index, part in enumerate(joined.parts):
            start = index * joined.columns
            products = multiply(x[:, start : start + part.in_features], part)
            scaled = [y.mul_(scales[index]) for y, scales in zip(products, joined.scales, strict=True)]
            totals = [total.add_(y) for total, y in zip(totals, scaled, strict=True)] if totals else scaled
        return tuple(totals)
