"""What the kernels of int8, fp8, codebook, lookup and sparse weights cost once compiled; tests/kernels/gpu_compile.py
says how.

python -m tests.kernels.gpu_families_compile     compiles every case anew and writes gpu_families_budget.json
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from kernels.gpu.tiles import ANY, Tile
from kernels.linear.int8 import gpu as int8_gpu
from kernels.linear.rounding import Rounding
from tests.kernels.gpu_compile import ARCHITECTURES, Case, K, N, record

BUDGET = Path(__file__).parent / "gpu_families_budget.json"
SIZES = ("padded", "out_features")


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def integers(bits: int, group_size: int, has_zeros: bool = False) -> int8_gpu.Prepared:
    """A matrix without data."""
    rounding = Rounding("int", 8, symmetric=not has_zeros)
    one = empty(1, dtype=torch.float32)
    groups = K // group_size
    return int8_gpu.Prepared(
        int8_gpu.Tokens(rounding, one, one, K, K, int8_gpu.LONGEST_RUN),
        bits,
        group_size,
        empty(N, K * bits // 8, dtype=torch.int8),
        empty(groups, N, dtype=torch.bfloat16),
        empty(groups, N, dtype=torch.int8) if has_zeros else None,
        empty(N, dtype=torch.float32) if has_zeros else None,
    )


INTEGERS = {
    "int8": integers(8, K),
    "int4 g128": integers(4, 128),
    "int4 g128 with zeros": integers(4, 128, has_zeros=True),
}


def int8_case(name: str, tile: Tile, architecture: int) -> Case:
    """Parts are written in float32, what is not split in bfloat16."""
    matrix = INTEGERS[name]
    types = {
        **dict.fromkeys(("codes", "weights", "zeros"), "*i8"),
        **dict.fromkeys(("token_scales", "sums"), "*fp32"),
        **dict.fromkeys(("token_zeros", "counts"), "*i32"),
        "scales": "*bf16",
        "out": "*bf16" if tile.max_tokens == ANY else "*fp32",
    }
    fixed, label = int8_gpu.constants(matrix, tile), f"{name}, up to {tile.max_tokens} rows"
    if tile.max_tokens == ANY:
        label = f"{name}, any rows"
    return Case(label, architecture, "int8", "multiply", types, fixed, tile.num_warps, tile.num_stages, sizes=SIZES)


def rounding_case(name: str, width: int, architecture: int) -> Case:
    matrix = INTEGERS[name]
    tokens = int8_gpu.Tokens(matrix.tokens.rounding, *(empty(1, dtype=torch.float32),) * 2, width, width, 128)
    fixed = int8_gpu.rounding_constants(tokens)
    types = {
        "x": "*bf16",
        "codes": "*i8",
        **dict.fromkeys(("fixed_scale", "fixed_zero", "scales"), "*fp32"),
        **dict.fromkeys(("zeros", "counts"), "*i32"),
    }
    label, warps = f"round_tokens of {width}, {name}", int8_gpu.ROUND_WARPS
    return Case(label, architecture, "int8", "round_tokens", types, fixed, warps, 1, False, ("width", "padded"))


def cases() -> Iterator[Case]:
    """The largest and the smallest tiles of each kernel on every architecture."""
    for architecture in ARCHITECTURES:
        for name, matrix in INTEGERS.items():
            tiles = int8_gpu.tiles_of(matrix, False)
            for tile in (tiles[0], tiles[-1]):
                yield int8_case(name, tile, architecture)
    yield int8_case("int8", int8_gpu.WHOLE_ROWS[2], 90)
    yield int8_case("int8", int8_gpu.WHOLE_ROWS[-1], 89)
    yield rounding_case("int4 g128 with zeros", 4096, 90)
    yield rounding_case("int8", 14336, 80)


if __name__ == "__main__":
    record(BUDGET, cases())
