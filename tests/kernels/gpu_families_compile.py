"""What the kernels of int8, fp8, codebook, lookup and sparse weights cost once compiled, those of transforms of
activations, and RoPE with the store; tests/kernels/gpu_compile.py says how.

python -m tests.kernels.gpu_families_compile     compiles every case anew and writes gpu_families_budget.json
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from kernels.attention.f16 import gpu as plain
from kernels.attention.quantized import gpu as quantized
from kernels.gpu import decoding, transforms
from kernels.gpu.decoding import BOOK, E4M3, TABLES, Decoded
from kernels.gpu.tiles import ANY, Tile
from kernels.linear.int8 import gpu as int8_gpu
from kernels.linear.rounding import Rounding
from kernels.linear.sparse import gpu as sparse_gpu
from tests.kernels.gpu_attention_compile import chunk_layout
from tests.kernels.gpu_compile import TYPES, Case, K, N, record

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
    fixed = int8_gpu.constants(matrix, tile)
    label = f"{name}, {f'up to {tile.max_tokens}' if tile.max_tokens < ANY else 'any'} rows"
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


CODES = {8: torch.uint8, 16: torch.int16}  # of books


def decoded(kind: int, group_size: int, bits: int, book: Tensor, rows_per_scale: int = 1) -> Decoded:
    """A matrix without data."""
    plane = decoding.plane_of(kind, K, group_size)
    width, dtype = (K // book.shape[1], CODES[bits]) if kind == BOOK else (K * bits // 32, torch.int32)
    groups = 1 if kind == TABLES else K // group_size
    scales = empty(groups, -(-N // rows_per_scale), dtype=torch.float32)
    return Decoded(kind, bits, K, group_size, plane, empty(N, width, dtype=dtype), book, scales, rows_per_scale)


UNREAD = empty(1, dtype=torch.float32)
DECODED = {
    "e4m3 128x128": decoded(E4M3, 128, 8, UNREAD, 128),
    "e4m3 row": decoded(E4M3, K, 8, UNREAD),
    "e4m3 1x32": decoded(E4M3, 32, 8, UNREAD),
    "65536 vectors of 8": decoded(BOOK, K, 16, empty(65536, 8, dtype=torch.bfloat16)),
    "256 vectors of 8": decoded(BOOK, K, 8, empty(256, 8, dtype=torch.bfloat16)),
    "16-value tables g64": decoded(TABLES, 64, 4, empty(N, K // 64, 16, dtype=torch.float16), N),
}


def decoded_case(name: str, tile: Tile, architecture: int) -> Case:
    matrix = DECODED[name]
    types = {
        "x": "*bf16",
        "codes": f"*{TYPES[matrix.codes.dtype]}",
        "book": f"*{TYPES[matrix.book.dtype]}",
        "scales": "*fp32",
        "out": "*bf16" if tile.max_tokens == ANY else "*fp32",
    }
    label = f"{name}, {f'up to {tile.max_tokens}' if tile.max_tokens < ANY else 'any'} rows"
    fixed = decoding.constants(matrix, tile)
    sizes = ("in_features", "out_features")
    return Case(label, architecture, "decoded", "multiply", types, fixed, tile.num_warps, tile.num_stages, sizes=sizes)


def sparse_case(tile: Tile, architecture: int) -> Case:
    types = {"x": "*bf16", "starts": "*i32", "columns": "*i32", "values": "*fp16", "out": "*bf16"}
    fixed = {"CHUNK": sparse_gpu.CHUNK, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    label = f"sparse, {f'up to {tile.max_tokens}' if tile.max_tokens < ANY else 'any'} rows"
    return Case(label, architecture, "sparse", "multiply", types, fixed, tile.num_warps, sizes=("out_features",))


def transform_case(rounding: Rounding, label: str, architecture: int) -> Case:
    types = {"x": "*bf16", "out": "*bf16", **dict.fromkeys(("given_scale", "given_zero", "unit"), "*fp32")}
    fixed = transforms.constants(rounding, rounding.channels or K)
    warps = transforms.num_warps(fixed["C"])
    sizes = ("width", "channels")
    return Case(f"rounded: {label}", architecture, "inputs", "round_groups", types, fixed, warps, 1, False, sizes)


def hadamard_case(block: int, architecture: int) -> Case:
    types = {"x": "*bf16", "out": "*bf16", "factor": "fp32"}
    fixed, warps = transforms.hadamard_constants(block), transforms.hadamard_warps(block)
    return Case(f"hadamard {block}", architecture, "quantize", "hadamard", types, fixed, warps, 1, False)


def rotation_case(architecture: int) -> Case:
    types = {"x": "*bf16", "out": "*bf16", "matrices": "*fp32"}
    return Case("rotation", architecture, "inputs", "rotate_blocks", types, dict(transforms.ROTATED), 4, 1)


def rotating_case(bits: tuple[float, float] | None, architecture: int) -> Case:
    """RoPE with the store to pages of `bits`, of float16 where there are none; heads of 128 channels."""
    heads = dict.fromkeys(("q", "k", "v", "q_out"), "*bf16")
    halves = dict.fromkeys(("pages", "halves", "recent"), "*fp16")
    numbers = dict.fromkeys(("cos", "sin", "key_clip", "key_prescale", "value_clip", "value_prescale"), "*fp32")
    types = heads | halves | numbers | {"slots": "*i64", "recent_slots": "*i64", "chunks": "*u8", "factor": "fp32"}
    kernel, fixed = "plain", plain.store_constants(128, 16)
    if bits is not None:
        kernel, fixed = "packed", quantized.rotating_constants(chunk_layout(bits, 128), (False, False), True)
    label = f"RoPE and store {'f16' if bits is None else f'k{bits[0]:g}v{bits[1]:g}'}"
    return Case(label, architecture, "rope_store", kernel, types, fixed, plain.STORE_WARPS, 1, False)


def every_case(architecture: int) -> Iterator[Case]:
    """All entries of every table."""
    for name, matrix in INTEGERS.items():
        for tile in int8_gpu.tiles_of(matrix, False):
            yield int8_case(name, tile, architecture)
    for name, decodable in DECODED.items():
        for tile in decoding.tiles_of(decodable, False):
            yield decoded_case(name, tile, architecture)


def cases() -> Iterator[Case]:
    """What takes most registers and shared memory on each architecture, and what a decode step takes on one."""
    largest = int8_gpu.WHOLE_ROWS[-1], int8_gpu.GROUPS_WITH_ZEROS[-1], decoding.TILES[-1]
    for architecture in (80, 90, 100):
        yield int8_case("int8", largest[0], architecture)
        yield decoded_case("e4m3 128x128", largest[2], architecture)
    yield int8_case("int4 g128 with zeros", largest[1], 100)
    for name in ("int8", "int4 g128"):
        yield int8_case(name, int8_gpu.FEW[0], 90)
    for name in ("e4m3 128x128", "65536 vectors of 8", "256 vectors of 8", "16-value tables g64"):
        yield decoded_case(name, decoding.TILES[0], 90)
    yield int8_case("int4 g128", int8_gpu.GROUPS[-1], 80)
    yield decoded_case("16-value tables g64", decoding.TABLE_TILES[-1], 80)
    yield decoded_case("65536 vectors of 8", largest[2], 89)
    yield rounding_case("int8", 14336, 80)
    yield transform_case(Rounding("e4m3", 8), "e4m3, tokens", 80)
    yield transform_case(Rounding("e2m1", 4, 16, scale_grid="e4m3", scale_unit=torch.ones(1)), "NVFP4", 80)
    yield hadamard_case(transforms.LONGEST_HADAMARD, 80)
    yield rotation_case(80)
    for architecture in (80, 90):
        yield rotating_case((4.0, 4.0), architecture)
    yield rotating_case(None, 90)
    yield sparse_case(sparse_gpu.TILES[0], 90)
    yield sparse_case(sparse_gpu.TILES[-1], 80)


if __name__ == "__main__":
    record(BUDGET, cases())
