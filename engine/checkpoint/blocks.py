"""Scales of blocks that run over a whole matrix, row after row, as scales of groups within rows."""

import math

from torch import Tensor


def blocks_to_groups(values: Tensor, block_size: int, shape: tuple[int, int]) -> tuple[int, Tensor]:
    """One value for each block of the flattened matrix -> (group_size, one value for each group of a row).

    values: [ceil(out * in / block_size)]; shape: (out, in) -> [out, in / group_size]. Where rows do not hold whole
    blocks a block ends inside a row, and groups are the largest that never straddle one.
    """
    out_features, in_features = shape
    group_size = math.gcd(block_size, in_features)
    groups = values.repeat_interleave(block_size // group_size)[: out_features * in_features // group_size]
    return group_size, groups.view(out_features, in_features // group_size).contiguous()


def num_blocks(block_size: int, shape: tuple[int, int]) -> int:
    """How many blocks cover the matrix; the last may be short."""
    return -(-shape[0] * shape[1] // block_size)
