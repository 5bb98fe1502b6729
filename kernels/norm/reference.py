"""The definition of RMSNorm."""

import torch
from torch import Tensor

from kernels.contract import RowSpec
from kernels.norm.checks import check_rows


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
        check_rows(x, weight)
        wide = x.float()
        mean_square = wide.square().mean(-1, keepdim=True)  # [..., 1]
        return weight * (wide * torch.rsqrt(mean_square + eps)).to(x.dtype)

    def add_rms_norm(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """x, delta: [..., width] -> (x + delta, its norm)."""
        check_rows(x, weight, delta)
        total = x + delta
        return total, self.rms_norm(total, weight, eps)
