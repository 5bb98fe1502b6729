"""Packed matrices that read the same activations as one: q, k and v; gate and up.

One launch in place of three, whose programs fill a GPU that those of k alone, with 1,024 rows, would not.
"""

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from kernels.gpu.configs import configs_for
from kernels.gpu.packing import Packed, Steps

MAX_JOINED = 3  # kernels/gpu/linear.py finds a row's matrix among so many
# What kernels are not compiled for, or what is compared by itself.
OWN = frozenset({"out_features", "words", "scales", "zeros", "offsets", "steps", "table", "configs", "joined_rows"})


def join_matrices(prepared: Sequence[Packed]) -> Packed | None:
    """A copy of matrices [N, K] as one [sum of N, K]; None where one kernel cannot serve them all, or where a program
    would have rows of two."""
    first = prepared[0]
    if len(prepared) == 1:
        return first
    if len(prepared) > MAX_JOINED or not all(are_alike(first, other) for other in prepared[1:]):
        return None
    rows = tuple(packed.out_features for packed in prepared)
    configs = configs_for(first.words.device, first.codes, sum(rows), first.in_features)
    longest = max(config.block_n for config in (*configs.entries, configs.fixed))
    if any(count % longest for count in rows[:-1]):
        return None
    by_row = 0 if first.exact_scales else 1  # the dimension of scales that rows are
    return replace(
        first,
        out_features=sum(rows),
        words=torch.cat([packed.words for packed in prepared]),
        scales=torch.cat([packed.scales for packed in prepared], by_row),
        zeros=_joined([packed.zeros for packed in prepared]),
        offsets=_joined([packed.offsets for packed in prepared]),
        steps=_joined_steps([packed.steps for packed in prepared]),
        configs=configs,
        joined_rows=rows,
    )


def are_alike(one: Packed, other: Packed) -> bool:
    """Whether two matrices differ in nothing but their rows."""
    if any(getattr(one, field.name) != getattr(other, field.name) for field in fields(Packed) if field.name not in OWN):
        return False
    if (one.table is None) != (other.table is None):
        return False
    if one.table is not None and other.table is not None and not torch.equal(one.table, other.table):
        return False
    return _kinds(one) == _kinds(other)


def ends_of(packed: Packed) -> tuple[int, int]:
    """Where the rows of the first matrix end, and those of the second; of what is not there, where all do."""
    ends = [sum(packed.rows[: i + 1]) for i in range(len(packed.rows))]
    return ends[0], ends[1] if len(ends) > 1 else ends[0]


def _kinds(packed: Packed) -> list[object]:
    steps = packed.steps
    parts = (None, None) if steps is None else (steps.scales, steps.offsets)
    tensors = (packed.scales, packed.zeros, packed.offsets, *parts)
    return [None if tensor is None else tensor.dtype for tensor in tensors] + [None if steps is None else steps.ratio]


def _joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """[num_groups, N] each."""
    found = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(found, 1) if found else None


def _joined_steps(every: Sequence[Steps | None]) -> Steps | None:
    found = [steps for steps in every if steps is not None]
    if not found:
        return None
    return Steps(found[0].ratio, torch.cat([steps.scales for steps in found], 1), _joined([s.offsets for s in found]))
