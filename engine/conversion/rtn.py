"""Round to nearest: the plain integer grid, 2 to 8 bits.

    symmetric   s = r max |w| / (2^(b-1) - 1)        z = 2^(b-1)
    asymmetric  s = r (max(w, 0) - min(w, 0)) / (2^b - 1)    z = round(-r min(w, 0) / s)
    q = clamp(round(w / s) + z, 0, 2^b - 1)          w' = s (q - z)

for each group of a row, ties to even, s rounded to float16 before it divides. r is 1; the clip search takes the r of
1, 0.95 ... 0.5 with the least sum of (w' - w)^2, the largest of equals.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.conversion.encoder import by_rows, from_groups, narrow, stored_scale, to_groups
from kernels.linear.affine.layout import AffineWeights
from kernels.linear.bitstream import pack_codes
from kernels.linear.weights import LinearWeights

NO_CLIP = (1.0,)
CLIPS = tuple(1 - 0.05 * i for i in range(11))


@dataclass(frozen=True)
class Rtn:
    """The encoder."""

    bits: int = 4  # 2..8
    group_size: int = 64
    symmetric: bool = True
    clip: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 or self.group_size < 1:
            raise ValueError(f"rtn takes 2 to 8 bits and groups of at least 1, found b{self.bits} g{self.group_size}")

    def encode(self, weight: Tensor) -> LinearWeights:
        codes, scales, zeros = by_rows(weight, self._rows)
        if self.symmetric:
            zeros = zeros[:1, :1].expand(scales.shape)
        term = AffineWeights(self.bits, weight.shape[1], self.group_size, codes, narrow(scales), zeros)
        return LinearWeights((term,))

    def _rows(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[rows, K] float32 -> packed codes, scales [rows, groups] float32, zeros [rows, groups] uint8."""
        groups = to_groups(rows, self.group_size)  # [rows, groups, G]
        best = torch.full(groups.shape[:2], torch.inf)
        codes, scales, zeros = torch.zeros_like(groups), best.clone(), best.clone()
        for ratio in CLIPS if self.clip else NO_CLIP:
            scale, zero = self._grid(groups, ratio)
            q = (groups / scale.unsqueeze(-1)).round().add_(zero.unsqueeze(-1)).clamp_(0, 2**self.bits - 1)
            error = (q - zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1)).sub_(groups).square_().sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            codes = torch.where(better.unsqueeze(-1), q, codes)
            scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
        packed = pack_codes(from_groups(codes, rows.shape[1]).to(torch.uint8), self.bits)
        return packed, scales, zeros.to(torch.uint8)

    def _grid(self, groups: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each group, [rows, groups] float32."""
        if self.symmetric:
            scale = stored_scale(groups.abs().amax(-1) * ratio / (2 ** (self.bits - 1) - 1))
            return scale, torch.full_like(scale, 2 ** (self.bits - 1))
        low, high = groups.amin(-1).clamp(max=0) * ratio, groups.amax(-1).clamp(min=0) * ratio
        scale = stored_scale((high - low) / (2**self.bits - 1))
        return scale, (-low / scale).round().clamp(0, 2**self.bits - 1)
