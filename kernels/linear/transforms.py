"""What is done to a layer's input before its terms, and to their sum after:  y = Post( sum_t Term_t( Pre(x) ) ).

Every transform is a linear map of the last dimension, or a rounding (rounding.py), the same for every token and
computed in an order of its own: a token's result has the same bits whatever shares its step.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, Protocol, cast

import torch
from torch import Tensor


class Transform(Protocol):
    """A square matrix M, known by what it does."""

    @property
    def width(self) -> int | None:
        """Channels it takes and gives; None when it takes any multiple of its block."""
        ...

    def describe(self) -> str:
        """What the start screen shows: "hadamard 32"."""
        ...

    def apply(self, x: Tensor) -> Tensor:
        """x: [num_tokens, width] -> M x for every token, x's dtype."""
        ...

    def apply_transposed(self, x: Tensor) -> Tensor:
        """x: [num_rows, width] -> M^T x for every row, x's dtype: what turns a term's rows into those of the layer."""
        ...


@dataclass(frozen=True)
class Permutation:
    """(M x)[j] = x[index[j]]: column j of the term multiplies input channel index[j] (GPTQ act-order)."""

    index: Tensor  # [width] int64, each channel once

    @property
    def width(self) -> int:
        return self.index.shape[0]

    def describe(self) -> str:
        return "act-order"

    def apply(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self.index)

    def apply_transposed(self, x: Tensor) -> Tensor:
        original = torch.empty_like(x)
        original[..., self.index] = x
        return original


@dataclass(frozen=True)
class Diagonal:
    """(M x)[j] = x[j] * scale[j]: channel scales (SmoothQuant, AWQ), or signs."""

    scale: Tensor  # [width] floating

    @property
    def width(self) -> int:
        return self.scale.shape[0]

    def describe(self) -> str:
        return "scaled"

    def apply(self, x: Tensor) -> Tensor:
        return (x * self.scale.float()).to(x.dtype)

    def apply_transposed(self, x: Tensor) -> Tensor:
        return self.apply(x)


@dataclass(frozen=True)
class Hadamard:
    """Every run of `block` channels is multiplied by the orthonormal Hadamard matrix, its own inverse and transpose:

    H[i, j] = (-1)^(i . j) / sqrt(block),  i . j counting the bits that both have (Sylvester's order)

    block log2(block) additions in place of block^2, in a fixed order, in float32. Raises ValueError unless the block is
    a power of two.
    """

    block: int

    def __post_init__(self) -> None:
        if self.block < 1 or self.block & (self.block - 1):
            raise ValueError(f"a Hadamard block must be a power of two, found {self.block}")

    @property
    def width(self) -> None:
        return None

    def describe(self) -> str:
        return f"hadamard {self.block}"

    def apply(self, x: Tensor) -> Tensor:
        shape = x.shape
        if shape[-1] % self.block:
            raise ValueError(f"{shape[-1]} channels are not whole Hadamard blocks of {self.block}")
        y = x.float().reshape(-1, self.block)
        half = 1
        while half < self.block:
            low, high = y.view(-1, self.block // (2 * half), 2, half).unbind(2)  # [rows, runs, half]
            y = torch.stack((low + high, low - high), dim=2).view(-1, self.block)
            half *= 2
        return (y * (1 / math.sqrt(self.block))).view(shape).to(x.dtype)

    def apply_transposed(self, x: Tensor) -> Tensor:
        return self.apply(x)


@dataclass(frozen=True)
class BlockRotation:
    """Every run of b channels is multiplied by its own matrix, or all by one:  (M x)[run i] = R_i x[run i].

    2 b operations for each channel, in order, in float32.
    """

    matrices: Tensor  # [num_runs or 1, b, b] floating

    def __post_init__(self) -> None:
        if self.matrices.ndim != 3 or self.matrices.shape[1] != self.matrices.shape[2]:
            raise ValueError(f"matrices has shape {tuple(self.matrices.shape)}, expected [runs, b, b]")

    @property
    def width(self) -> int | None:
        num_runs, block, _ = self.matrices.shape
        return None if num_runs == 1 else num_runs * block

    def describe(self) -> str:
        return f"rotation {self.matrices.shape[1]}"

    def apply(self, x: Tensor) -> Tensor:
        return self._multiply(x, self.matrices)

    def apply_transposed(self, x: Tensor) -> Tensor:
        return self._multiply(x, self.matrices.mT)

    def _multiply(self, x: Tensor, matrices: Tensor) -> Tensor:
        num_matrices, block, _ = matrices.shape
        if x.shape[-1] % block or num_matrices not in (1, x.shape[-1] // block):
            raise ValueError(f"{x.shape[-1]} channels are not the runs of a rotation {tuple(matrices.shape)}")
        runs = x.float().reshape(*x.shape[:-1], -1, block)  # [num_tokens, num_runs, b]
        columns = matrices.float().mT.contiguous()  # [num_runs or 1, b, b]: entry j is column j of each matrix
        total = runs[..., :1] * columns[:, 0]
        for j in range(1, block):  # products and sums apart: a matrix product would choose its order by the batch
            total = total + runs[..., j : j + 1] * columns[:, j]
        return total.flatten(-2).to(x.dtype)


def same(first: tuple[Transform, ...], second: tuple[Transform, ...]) -> bool:
    """Whether two lists of transforms do the same, so that their layers may share what they give."""
    if [type(one) for one in first] != [type(one) for one in second]:
        return False
    return all(_equal(a, b) for a, b in zip(first, second, strict=True))


def _equal(a: Transform, b: Transform) -> bool:
    names = [field.name for field in fields(cast(Any, a))]
    pairs = [(getattr(a, name), getattr(b, name)) for name in names]
    return all(torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y for x, y in pairs)
