"""What the native back ends share: matrices that read the same activations, multiplied in one call."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels import native
from kernels.contract import LinearSpec
from kernels.linear.blocks import check_width


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
    x = x.contiguous()
    outs = tuple(torch.empty(x.shape[0], rows) for rows in joined.rows)
    joined.group.run(x.data_ptr(), x.shape[0], [out.data_ptr() for out in outs])
    return outs


def packed_refusal(spec: LinearSpec) -> str | None:
    """Why codes of this layer have no packed form (kernels/native/packed.hpp), or None."""
    if (reason := native.refusal(spec.device, spec.dtype)) is not None:
        return reason
    if spec.group_size % 16 and spec.group_size < spec.in_features:
        return f"groups of {spec.group_size} channels are neither a multiple of 16 nor the whole row"
    return None
