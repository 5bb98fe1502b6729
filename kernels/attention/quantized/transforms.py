"""Orthogonal changes of a head's channels, made before quantizing and undone after attention.

q.k is the same when q and k turn alike, so the keys' transform is applied to queries as well; the values' transform is
undone on the output, once, because attention is linear in the values. A query head turns like its kv head.
"""

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

TILE_ROWS = 4  # rows of a product with a matrix: one shape, so that a row does not depend on the others


class HeadTransform(Protocol):
    """x' = T x in every head."""

    def apply(self, x: Tensor) -> Tensor:
        """x: [num_tokens, heads, D] float32 -> the same shape; heads are kv heads or a multiple of them."""
        ...

    def invert(self, x: Tensor) -> Tensor:
        """The inverse of `apply`."""
        ...

    def to(self, device: torch.device) -> "HeadTransform":
        """The same with its tensors on `device`."""
        ...


@dataclass(frozen=True)
class Identity:
    """Channels as they are."""

    def apply(self, x: Tensor) -> Tensor:
        return x

    def invert(self, x: Tensor) -> Tensor:
        return x

    def to(self, device: torch.device) -> HeadTransform:
        return self


@dataclass(frozen=True)
class Hadamard:
    """x'[c] = n^-1/2 sum_c' (-1)^popcount(c & c') x[c'] in blocks of n channels, n the largest power of two in D.

    A channel that stands out is spread over its block: one outlier of size a becomes n values of a / sqrt(n). It is its
    own inverse. D log2(n) additions a head, by butterflies over distances 1, 2, 4, ...
    """

    def apply(self, x: Tensor) -> Tensor:
        head_dim = x.shape[-1]
        block = head_dim & -head_dim
        distance = 1
        x = x.contiguous()
        while distance < block:
            pairs = x.view(*x.shape[:-1], -1, 2, distance)
            low, high = pairs[..., 0, :], pairs[..., 1, :]
            x = torch.stack((low + high, low - high), dim=-2).flatten(-3)
            distance *= 2
        return x * (1 / math.sqrt(block))

    def invert(self, x: Tensor) -> Tensor:
        return self.apply(x)

    def to(self, device: torch.device) -> HeadTransform:
        return self


@dataclass(frozen=True)
class Permutation:
    """x'[c] = x[order[c]]: channels of a like range side by side, so that they share a group."""

    order: Tensor  # [num_kv_heads, D] int64
    # (heads, inverse) -> [heads, D]: a decode step gathers a row in half the time of making its order anew
    _orders: dict[tuple[int, bool], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def apply(self, x: Tensor) -> Tensor:
        return x.gather(-1, self._order(x.shape[1], inverse=False).expand(x.shape))

    def invert(self, x: Tensor) -> Tensor:
        return x.gather(-1, self._order(x.shape[1], inverse=True).expand(x.shape))

    def to(self, device: torch.device) -> HeadTransform:
        return Permutation(self.order.to(device))

    def _order(self, num_heads: int, inverse: bool) -> Tensor:
        order = self._orders.get((num_heads, inverse))
        if order is None:
            order = self.order.argsort(-1) if inverse else self.order
            order = order.repeat_interleave(num_heads // order.shape[0], dim=0)
            self._orders[num_heads, inverse] = order
        return order


@dataclass(frozen=True)
class Rotation:
    """x' = R x with an orthogonal matrix of its own for each kv head. D^2 multiplications a head."""

    matrices: Tensor  # [num_kv_heads, D, D] float32

    def apply(self, x: Tensor) -> Tensor:
        return self._multiply(x, self.matrices.mT)

    def invert(self, x: Tensor) -> Tensor:
        return self._multiply(x, self.matrices)

    def to(self, device: torch.device) -> HeadTransform:
        return Rotation(self.matrices.to(device))

    def _multiply(self, x: Tensor, matrices: Tensor) -> Tensor:
        num_tokens, num_heads, head_dim = x.shape
        num_kv_heads = matrices.shape[0]
        padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -num_tokens % TILE_ROWS))
        turned = [
            (tile.view(TILE_ROWS, num_kv_heads, -1, head_dim).permute(1, 0, 2, 3).flatten(1, 2) @ matrices)
            .view(num_kv_heads, TILE_ROWS, -1, head_dim)
            .permute(1, 0, 2, 3)
            .reshape(TILE_ROWS, num_heads, head_dim)
            for tile in torch.split(padded, TILE_ROWS)
        ]
        return torch.cat(turned)[:num_tokens] if turned else x


@dataclass(frozen=True)
class Chain:
    """One transform after another."""

    parts: tuple[HeadTransform, ...]

    def apply(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part.apply(x)
        return x

    def invert(self, x: Tensor) -> Tensor:
        for part in reversed(self.parts):
            x = part.invert(x)
        return x

    def to(self, device: torch.device) -> HeadTransform:
        return Chain(tuple(part.to(device) for part in self.parts))
