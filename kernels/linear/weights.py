"""The canonical description of a linear layer, whatever the format on disk.

    y = Post( sum_t Term_t( Pre(x) ) ) + bias

Every reader in ``engine/checkpoint`` returns this; kernels see single terms.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.linear.transforms import Transform


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
class LinearWeights:
    """A whole layer: terms that are summed, what is done to the input first and to the sum last, and the bias."""

    terms: tuple[Term, ...]
    pre: tuple[Transform, ...] = ()  # the first is applied first
    bias: Tensor | None = None  # [out_features]
    post: tuple[Transform, ...] = ()  # likewise

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
        around = [transform.describe() for transform in (*self.pre, *self.post)]
        return " ".join([" + ".join(term.describe() for term in self.terms), *around])

    def dequantize(self) -> Tensor:
        """Return W as [out_features, in_features] float32, columns in the order of the layer's input channels."""
        weight = torch.stack([term.dequantize() for term in self.terms]).sum(0)  # [out, in]
        for transform in reversed(self.pre):
            weight = transform.apply_transposed(weight)
        for transform in self.post:
            weight = transform.apply(weight.T).T
        return weight
