"""PTQTP (arXiv:2509.16989): a matrix as the sum of two ternary planes, each with one scale for a group of a row.

    W' = a1 T1 + a2 T2,   T in {-1, 0, 1},   groups of 128

No calibration data. Two steps take turns in every group, from T1 = sign(w), T2 = sign(w - mean |w| T1), our own start:

    a = (S^T S + l I)^-1 S^T w,  S = [T1 T2]      l = 1e-8, times 10 while the condition number exceeds 1e6, at most 1
    (T1, T2)_i = the one of nine pairs whose a1 t1 + a2 t2 is nearest to w_i

until no scale moves by more than 1e-4 of the group's root mean square, or 50 times. Scales are then rounded to float16
and the pairs chosen once more. Two terms of the table family: 4.25 bits a weight in groups of 128.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.conversion.encoder import by_rows, from_groups, narrow, stored_scale, to_groups
from kernels.linear.bitstream import pack_codes
from kernels.linear.table.layout import TableWeights
from kernels.linear.table.tables import TERNARY
from kernels.linear.weights import LinearWeights

MAX_ROUNDS = 50
TOLERANCE = 1e-4
FIRST_RIDGE, LAST_RIDGE, MAX_CONDITION = 1e-8, 1.0, 1e6


@dataclass(frozen=True)
class Ptqtp:
    """The encoder."""

    group_size: int = 128

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ValueError(f"ptqtp takes groups of at least 1, found g{self.group_size}")

    def encode(self, weight: Tensor) -> LinearWeights:
        codes1, codes2, scales1, scales2 = by_rows(weight, self._rows)
        planes = ((codes1, scales1), (codes2, scales2))
        return LinearWeights(
            tuple(
                TableWeights(2, weight.shape[1], self.group_size, codes, narrow(scales), TERNARY)
                for codes, scales in planes
            )
        )

    def _rows(self, rows: Tensor) -> tuple[Tensor, ...]:
        """[rows, K] float32 -> packed codes of both planes, scales of both planes."""
        groups = to_groups(rows, self.group_size)  # [rows, groups, G]
        alpha = solve(groups.flatten(0, 1)).view(*groups.shape[:2], 2)
        alpha = torch.stack([stored_scale(one) for one in alpha.unbind(-1)], -1)
        planes = nearest_pairs(groups, alpha)  # [2, rows, groups, G]
        codes = [pack_codes((from_groups(plane, rows.shape[1]) + 1).to(torch.uint8), 2) for plane in planes]
        return (*codes, *alpha.unbind(-1))


def solve(groups: Tensor) -> Tensor:
    """groups: [groups, G] floating -> both scales of each group, [groups, 2], neither negative."""
    first = groups.sign()
    second = (groups - groups.abs().mean(-1, keepdim=True) * first).sign()
    planes = torch.stack((first, second))
    size = groups.square().mean(-1, keepdim=True).sqrt()  # [groups, 1]
    alpha = torch.zeros(groups.shape[0], 2, dtype=groups.dtype)
    left = torch.arange(groups.shape[0])  # groups whose scales still move
    for _ in range(MAX_ROUNDS):
        found = best_scales(groups[left], planes)
        moved = ((found - alpha[left]).abs() > TOLERANCE * size[left]).any(-1)
        alpha[left] = found
        left = left[moved]
        if not len(left):
            break
        planes = nearest_pairs(groups[left], alpha[left])
    return alpha


def best_scales(groups: Tensor, planes: Tensor) -> Tensor:
    """The ridge regression of each group on its planes; a negative scale is given to its plane's sign."""
    first, second = planes
    n11, n12, n22 = first.square().sum(-1), (first * second).sum(-1), second.square().sum(-1)
    b1, b2 = (first * groups).sum(-1), (second * groups).sum(-1)
    middle, radius = (n11 + n22) / 2, (((n11 - n22) / 2).square() + n12.square()).sqrt()
    ridge = torch.full_like(middle, FIRST_RIDGE)
    while bool(
        (bad := (middle + radius + ridge > MAX_CONDITION * (middle - radius + ridge)) & (ridge < LAST_RIDGE)).any()
    ):
        ridge = torch.where(bad, (ridge * 10).clamp(max=LAST_RIDGE), ridge)
    d1, d2 = n11 + ridge, n22 + ridge
    determinant = d1 * d2 - n12.square()
    alpha: Tensor = torch.stack((d2 * b1 - n12 * b2, d1 * b2 - n12 * b1), -1) / determinant.unsqueeze(-1)
    return alpha.abs()


def nearest_pairs(groups: Tensor, alpha: Tensor) -> Tensor:
    """[2, ..., G]: the pair of trits for every weight of the groups [..., G]; alpha: [..., 2].

    By symmetry only the magnitudes 0, a2, a1, |a1 - a2|, a1 + a2 compete: four comparisons with the middles between.
    """
    a1, a2 = alpha.unbind(-1)
    flip = (a1 - a2).sign()
    flip = torch.where(flip == 0, 1.0, flip)
    zero, one = torch.zeros_like(a1), torch.ones_like(a1)
    levels, order = torch.stack((zero, a2, a1, (a1 - a2).abs(), a1 + a2), -1).sort(-1)  # [..., 5]
    trits = torch.stack(
        (torch.stack((zero, zero, one, flip, one), -1), torch.stack((zero, one, zero, -flip, one), -1))
    ).gather(-1, order.expand(2, *order.shape))  # [2, ..., 5]
    middles = (levels[..., 1:] + levels[..., :-1]) / 2
    steps = trits.diff(dim=-1)  # [2, ..., 4]: how both change from one level to the next
    magnitude, planes = groups.abs(), groups.new_zeros(2, *groups.shape)
    for i in range(4):
        planes += steps[..., i : i + 1] * (magnitude > middles[..., i : i + 1])
    return planes * groups.sign()
