"""What the native back ends share: how packed matrices that read the same activations are multiplied in one call."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from kernels import native
from kernels.contract import LinearSpec
from kernels.linear.blocks import check_width
from kernels.native.checks import check_memory

if native.MISSING is None or TYPE_CHECKING:
    from kernels.native import _native

FLOAT_TYPES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}  # of weights


class Group(Protocol):
    """Matrices as the C++ library holds them. x, outs: addresses of float32."""

    def run(self, x: int, num_tokens: int, outs: list[int]) -> None: ...


@dataclass(frozen=True)
class Joined:
    """A group and the sizes of its matrices."""

    group: Group
    in_features: int
    rows: tuple[int, ...]  # out_features of each


def multiply(x: Tensor, joined: Joined) -> tuple[Tensor, ...]:
    """x: [num_tokens, K] float32 -> [num_tokens, N] float32 for each matrix. Raises ValueError for another K."""
    check_width(x, joined.in_features)
    check_memory("activations", x)
    x = x.contiguous()
    outs = tuple(x.new_empty(x.shape[0], rows) for rows in joined.rows)
    joined.group.run(x.data_ptr(), x.shape[0], [out.data_ptr() for out in outs])
    return outs


def packed_refusal(spec: LinearSpec) -> str | None:
    """Why codes of this layer have no packed form (kernels/native/packed.hpp), or None."""
    if (reason := native.refusal(spec.device, spec.dtype)) is not None:
        return reason
    if spec.group_size % 16 and spec.group_size < spec.in_features:
        return f"groups of {spec.group_size} channels are neither a multiple of 16 nor the whole row"
    return None


def float_type(weight: Tensor) -> "_native.FloatType":
    """What the library calls the weight's dtype. Raises ValueError for one it cannot read."""
    check_memory("weights", weight, tuple(FLOAT_TYPES))
    kind: _native.FloatType = getattr(_native.FloatType, FLOAT_TYPES[weight.dtype])
    return kind


class RoundingKernel:
    """A back end of packed weights that rounds activations to 8 bits (kernels/native/linear.hpp)."""

    name = "native"

    def refuses(self, spec: LinearSpec) -> str | None:
        if (reason := packed_refusal(spec)) is not None:
            return reason
        if spec.exact_activations:
            return "rounds activations to 8 bits, and exact ones were asked for"
        return None

    def join(self, prepared: "Sequence[_native.Packed]") -> Joined | None:
        """None when the matrices cut their channels into blocks of different lengths."""
        if len({packed.block_channels for packed in prepared}) != 1:
            return None
        rows = tuple(packed.num_rows for packed in prepared)
        return Joined(_native.Group(list(prepared)), prepared[0].num_channels, rows)

    def linear(self, x: Tensor, joined: Joined) -> tuple[Tensor, ...]:
        """x: [num_tokens, K] float32 -> [num_tokens, N] float32 for each matrix."""
        return multiply(x, joined)


class FloatKernel:
    """A back end of packed weights that takes activations as they are (kernels/native/exact.hpp)."""

    name = "native-float"

    def refuses(self, spec: LinearSpec) -> str | None:
        return packed_refusal(spec)

    def join(self, prepared: "Sequence[_native.Packed]") -> Joined:
        rows = tuple(packed.num_rows for packed in prepared)
        return Joined(_native.ExactGroup(list(prepared)), prepared[0].num_channels, rows)

    def linear(self, x: Tensor, joined: Joined) -> tuple[Tensor, ...]:
        """x: [num_tokens, K] float32 -> [num_tokens, N] float32 for each matrix."""
        return multiply(x, joined)
