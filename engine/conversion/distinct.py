"""The distinct values of every group of a matrix: all that is left of the grid that weights were once rounded to."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.conversion.encoder import by_rows, to_groups

MAX_VALUES = 16


@dataclass(frozen=True)
class Distinct:
    """One matrix [N, K] as tables and codes: w[n, k] = values[n, k // G, codes[n, k]], exactly."""

    group_size: int
    dtype: torch.dtype  # of the weights
    codes: Tensor  # [N, K] uint8
    values: Tensor  # [N, groups, 16] float32, rising; the last one repeated to the end
    count: int  # the most values that a group has

    @property
    def bits(self) -> int:
        return max(1, (self.count - 1).bit_length())

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    def first_row(self) -> "Distinct":
        return replace(self, codes=self.codes[:1], values=self.values[:1])

    def rename(self, codes: Tensor) -> Tensor:
        """Each weight's code, given the code of each of its group's values.  [N, groups, 16] uint8 -> [N, K] uint8."""
        group = torch.arange(self.in_features) // self.group_size * MAX_VALUES  # [K]
        step = max(1, (1 << 22) // self.in_features)
        rows = [
            new.flatten(1).gather(1, group + old)
            for new, old in zip(torch.split(codes, step), torch.split(self.codes, step), strict=True)
        ]
        return torch.cat(rows)


def find_distinct(weight: Tensor, group_size: int) -> Distinct | None:
    """The distinct values of groups of `group_size` channels; None when a group has more than 16. -0 counts as 0."""
    try:
        codes, values, counts = by_rows(weight, lambda rows: _distinct_rows(rows, group_size))
    except _TooMany:
        return None
    return Distinct(group_size, weight.dtype, codes, values, int(counts.max()) if counts.numel() else 1)


def most_distinct(weight: Tensor, group_size: int) -> tuple[int, int]:
    """The most distinct values in a group, and the row where that is."""
    groups = _groups(weight.float(), group_size)
    counts = (groups.sort(-1).values.diff(dim=-1) != 0).sum(-1).amax(-1) + 1  # [rows]
    return int(counts.max()), int(counts.argmax())


class _TooMany(Exception):
    """A group has more values than a table holds."""


def _distinct_rows(rows: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    groups = _groups(rows, group_size)
    ordered, order = groups.sort(-1)
    rank = torch.nn.functional.pad((ordered.diff(dim=-1) != 0).cumsum(-1), (1, 0))  # [rows, groups, G]
    counts = rank[..., -1:] + 1
    if int(counts.max()) > MAX_VALUES:
        raise _TooMany
    values = ordered[..., -1:].repeat(1, 1, MAX_VALUES).scatter(-1, rank, ordered)
    codes = torch.empty_like(rank).scatter(-1, order, rank)
    return codes.flatten(1)[:, : rows.shape[1]].to(torch.uint8), values, counts.squeeze(-1)


def _groups(rows: Tensor, group_size: int) -> Tensor:
    """[rows, groups, G]; a short last group is filled up with its last weight, which adds no value."""
    missing = -rows.shape[1] % group_size
    filled = torch.cat((rows, rows[:, -1:].expand(-1, missing)), dim=1) if missing else rows
    return to_groups(filled + 0.0, group_size)  # -0 + 0 is 0
