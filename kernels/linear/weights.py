"""The canonical description of a linear layer, whatever the format on disk.

    y = sum_t Term_t( Pre(x) ) + bias

Every reader in ``engine/checkpoint`` returns this; kernels see single terms. Families with post transforms add them
here the day a format needs them.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Term(Protocol):
    """One family's weights for a [out_features, in_features] matrix."""

    @property
    def family(self) -> str:
        """The folder under kernels/linear that defines it."""
        ...

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    @property
    def bits(self) -> int:
        """Of one code or element."""
        ...

    @property
    def group_size(self) -> int:
        """Input channels that share a scale; in_features when a row has one or none."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes that must be read once per token: codes, scales, zero points."""
        ...

    def describe(self) -> str:
        """What the start screen shows: "4-bit g64"."""
        ...

    def dequantize(self) -> Tensor:
        """Return the [out_features, in_features] float32 matrix that defines this term."""
        ...


@dataclass(frozen=True)
class Permutation:
    """Pre-transform: column j of the term multiplies input channel ``index[j]`` (GPTQ act-order)."""

    index: Tensor  # [in_features] int64

    def apply(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> the same shape, channels in the term's order."""
        return x.index_select(-1, self.index)


@dataclass(frozen=True)
class LinearWeights:
    """A whole layer: terms that are summed, what is done to the input first, and the bias."""

    terms: tuple[Term, ...]
    pre: tuple[Permutation, ...] = ()
    bias: Tensor | None = None  # [out_features]

    @property
    def in_features(self) -> int:
        return self.terms[0].in_features

    @property
    def out_features(self) -> int:
        return self.terms[0].out_features

    @property
    def num_bytes(self) -> int:
        return sum(term.num_bytes for term in self.terms)

    def describe(self) -> str:
        order = " act-order" if self.pre else ""
        return " + ".join(term.describe() for term in self.terms) + order

    def dequantize(self) -> Tensor:
        """Return W as [out_features, in_features] float32, columns in the order of the layer's input channels."""
        weight = torch.stack([term.dequantize() for term in self.terms]).sum(0)  # [out, in]
        for permutation in reversed(self.pre):
            original = torch.empty_like(weight)
            original[:, permutation.index] = weight
            weight = original
        return weight
