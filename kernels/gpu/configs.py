"""How a call is cut into programs: one shipped table, by kernel and rows. Nothing is tuned while requests wait.

The figures come from what compiles without spilling for sm_80, sm_90 and sm_100 (tests/kernels/gpu_budget.json), from
instructions counted in what the compiler made (benchmarks/gpu_instructions.py) and from counting programs and bytes;
none has been timed on a GPU yet.
"""

from dataclasses import dataclass

MIN_PROGRAMS = 256  # about two for each of the 132 multiprocessors of an H100
MIN_BLOCKS = 2  # of a split: less would be all prologue
MAX_SPLITS = 16


@dataclass(frozen=True)
class Config:
    """One specialization of a kernel for up to max_tokens rows."""

    kernel: str  # "few" or "many"
    max_tokens: int  # rows of activations; above the last entry's, the last serves
    block_m: int  # rows of activations in a program
    block_n: int  # rows of weights in a program
    num_warps: int  # two keep mma.sync on sm_90, whose operands need no fences: 2.0 instructions a weight, wgmma 4.5
    num_stages: int


ANY = 1 << 30
CONFIGS = (  # in order of max_tokens
    Config("few", 8, block_m=8, block_n=64, num_warps=2, num_stages=3),
    Config("few", 16, block_m=16, block_n=64, num_warps=2, num_stages=3),
    Config("many", 64, block_m=64, block_n=64, num_warps=4, num_stages=3),
    Config("many", ANY, block_m=128, block_n=128, num_warps=8, num_stages=2),
)
FIXED = Config("few", ANY, block_m=16, block_n=64, num_warps=2, num_stages=3)


@dataclass(frozen=True)
class Grid:
    """The programs of one call."""

    config: Config
    tiles_m: int
    tiles_n: int
    num_splits: int  # parts of the channels, summed in order afterwards
    blocks_per_split: int


def grid_for(num_tokens: int, out_features: int, num_blocks: int, fixed: bool = False) -> Grid:
    """Splits depend on the matrix and the table's entry alone, so that within an entry no row depends on the batch;
    with `fixed` there is one entry for any number of rows."""
    config = FIXED if fixed else next(config for config in CONFIGS if num_tokens <= config.max_tokens)
    tiles_n = -(-out_features // config.block_n)
    splits = 1
    if fixed or config.max_tokens < ANY:
        while splits < MAX_SPLITS and tiles_n * splits < MIN_PROGRAMS and num_blocks >= 2 * splits * MIN_BLOCKS:
            splits *= 2
    per_split = -(-num_blocks // splits)
    return Grid(config, -(-num_tokens // config.block_m), tiles_n, -(-num_blocks // per_split), per_split)
