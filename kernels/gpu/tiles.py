"""How products of bytes and of vectors from a book are cut into programs: kernels/gpu/{int8,decoded}.py.

What compiles without spilling for sm_80, sm_90 and sm_100 (tests/kernels/gpu_families_budget.json), and counts of
programs and bytes; none has been timed on a GPU yet.
"""

from collections.abc import Sequence
from dataclasses import dataclass

ANY = 1 << 30
MIN_PROGRAMS = 256  # about two for each of the 132 multiprocessors of an H100
MIN_BLOCKS = 2  # of a split: less would be all prologue
MAX_SPLITS = 16


@dataclass(frozen=True)
class Tile:
    """What one program computes, for up to max_tokens rows."""

    max_tokens: int  # rows of activations; above the last entry's, the last serves
    block_m: int  # rows of activations in a program
    block_n: int  # rows of weights in a program
    num_warps: int
    num_stages: int  # loads under way ahead of the products


@dataclass(frozen=True)
class Cut:
    """The programs of one call."""

    tile: Tile
    tiles_m: int
    tiles_n: int
    num_splits: int  # parts of the channels, summed in order afterwards
    blocks_per_split: int


def cut(tiles: Sequence[Tile], num_tokens: int, out_features: int, num_blocks: int) -> Cut:
    """Splits depend on the matrix and the entry alone, so that within an entry no row depends on the batch. `tiles` in
    order of max_tokens."""
    tile = next(tile for tile in tiles if num_tokens <= tile.max_tokens)
    tiles_n = -(-out_features // tile.block_n)
    splits = 1
    if tile.block_m <= 16 or tile.max_tokens < ANY:
        while splits < MAX_SPLITS and tiles_n * splits < MIN_PROGRAMS and num_blocks >= 2 * splits * MIN_BLOCKS:
            splits *= 2
    per_split = -(-num_blocks // splits)
    return Cut(tile, -(-num_tokens // tile.block_m), tiles_n, -(-num_blocks // per_split), per_split)
