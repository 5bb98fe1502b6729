"""The definition of RMSNorm."""

import torch
from torch import Tensor

from kernels.contract import RowSpec


class NormReference:
    """y = w * x / sqrt(mean(x^2) + eps) over the last dimension; the quotient in float32, rounded to x's dtype.

    The product with w is taken after that rounding, as transformers does. Reads and writes x once: 2 * 4 bytes and
    4 operations an element.
    """

    name = "reference"

    def refuses(self, spec: RowSpec) -> str | None:
        return None

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x: [..., width], weight: [width] of x's dtype -> x's shape and dtype."""
        wide = x.float()
        mean_square = wide.square().mean(-1, keepdim=True)  # [..., 1]
        return weight * (wide * torch.rsqrt(mean_square + eps)).to(x.dtype)
