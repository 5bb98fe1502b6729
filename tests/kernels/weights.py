"""Random weights in canonical form, and what they mean, computed another way."""

from dataclasses import replace

import torch
from torch import Tensor

from kernels.linear.affine.layout import AffineWeights, Nested
from kernels.linear.bitstream import pack_codes
from kernels.linear.codebook.layout import CodebookWeights
from kernels.linear.dense.layout import DenseWeights
from kernels.linear.fp8.layout import Fp8Weights
from kernels.linear.int8.layout import Int8Weights
from kernels.linear.lookup.layout import LookupWeights
from kernels.linear.lowrank.layout import LowRankWeights
from kernels.linear.rounding import Rounding
from kernels.linear.sparse.layout import SparseWeights
from kernels.linear.table.layout import TableWeights
from kernels.linear.table.tables import NF4
from kernels.linear.weights import Term


def random_affine(
    bits: int, in_features: int, out_features: int, group_size: int, scale_dtype: torch.dtype, seed: int
) -> AffineWeights:
    """Codes, scales and integer zero points over their whole range."""
    random = torch.Generator().manual_seed(seed)
    shape = (out_features, -(-in_features // group_size))  # [N, groups]
    codes = torch.randint(0, 2**bits, (out_features, in_features), generator=random, dtype=torch.uint8)
    scales = (torch.rand(shape, generator=random) + 0.1).to(scale_dtype)
    zeros = torch.randint(0, 2**bits, shape, generator=random, dtype=torch.uint8)
    return AffineWeights(bits, in_features, group_size, pack_codes(codes, bits), scales, zeros)


def random_minima(bits: int, in_features: int, out_features: int, group_size: int, seed: int) -> AffineWeights:
    """Offsets in place of zero points, and a group whose scale is 0: all its weights are the offset."""
    weights = random_affine(bits, in_features, out_features, group_size, torch.float32, seed)
    weights.scales[0, 0] = 0
    offsets = weights.scales.flip(0) * -(2.0 ** (bits - 1))
    return replace(weights, zeros=torch.zeros(1, 1, dtype=torch.uint8).expand(weights.scales.shape), offsets=offsets)


def random_nested(bits: int, in_features: int, out_features: int, group_size: int, seed: int) -> AffineWeights:
    """Scales and offsets that count steps of 256 channels; in_features is a multiple of 256."""
    random = torch.Generator().manual_seed(seed)
    weights = random_affine(bits, in_features, out_features, group_size, torch.float32, seed)
    shape, num_steps = weights.scales.shape, in_features // 256

    def parameters() -> tuple[Tensor, Tensor, Tensor]:
        counts = torch.randint(-63, 64, shape, generator=random, dtype=torch.int8)
        steps = (torch.rand(out_features, num_steps, generator=random) + 0.1).half()
        exact = (counts.view(out_features, num_steps, -1) * steps.float().unsqueeze(-1)).flatten(1)
        return counts, steps, exact

    (scales, scale_steps, exact_scales), (offsets, offset_steps, exact_offsets) = parameters(), parameters()
    return replace(
        weights,
        scales=exact_scales,
        zeros=torch.zeros(1, 1, dtype=torch.uint8).expand(shape),
        offsets=exact_offsets,
        nested=Nested(scales, scale_steps, offsets, offset_steps),
    )


def random_dense(in_features: int, out_features: int, dtype: torch.dtype, seed: int) -> DenseWeights:
    random = torch.Generator().manual_seed(seed)
    return DenseWeights(torch.randn(out_features, in_features, generator=random).to(dtype))


def random_table(
    table: tuple[float, ...], in_features: int, out_features: int, group_size: int, scale_dtype: torch.dtype, seed: int
) -> TableWeights:
    """Codes over the whole table; scales over two octaves, with a factor where they are of one byte."""
    random = torch.Generator().manual_seed(seed)
    bits = max(1, (len(table) - 1).bit_length())
    codes = torch.randint(0, len(table), (out_features, in_features), generator=random, dtype=torch.uint8)
    shape = (out_features, -(-in_features // group_size))  # [N, groups]
    factor = 1.0
    if scale_dtype == torch.float8_e8m0fnu:
        scales = torch.randint(125, 129, shape, generator=random, dtype=torch.uint8).view(scale_dtype)  # 2^-2 .. 2^1
    elif scale_dtype == torch.float8_e4m3fn:
        scales = torch.randint(1, 127, shape, generator=random, dtype=torch.uint8).view(scale_dtype)
        factor = 0.013
    else:
        scales = (torch.rand(shape, generator=random) + 0.1).to(scale_dtype)
    return TableWeights(bits, in_features, group_size, pack_codes(codes, bits), scales, table, factor)


def random_lookup(bits: int, in_features: int, out_features: int, group_size: int, seed: int) -> LookupWeights:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (out_features, in_features), generator=random, dtype=torch.uint8)
    tables = torch.randn(out_features, -(-in_features // group_size), 2**bits, generator=random).half()
    return LookupWeights(bits, in_features, group_size, pack_codes(codes, bits), tables)


def random_codebook(
    vector_size: int, num_vectors: int, in_features: int, out_features: int, group_size: int, seed: int
) -> CodebookWeights:
    """More than 256 vectors take codes of 16 bits, of which the upper half is stored negative."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, num_vectors, (out_features, in_features // vector_size), generator=random)
    book = torch.randn(num_vectors, vector_size, generator=random).half()
    scales = torch.rand(out_features, -(-in_features // group_size), generator=random) + 0.1
    stored = codes.to(torch.uint8 if num_vectors <= 256 else torch.int16)
    return CodebookWeights(in_features, group_size, stored, book, scales)


def random_lowrank(in_features: int, out_features: int, rank: int, seed: int) -> LowRankWeights:
    random = torch.Generator().manual_seed(seed)
    a, b = torch.randn(out_features, rank, generator=random), torch.randn(rank, in_features, generator=random)
    return LowRankWeights(a.half(), b.half())


def random_sparse(in_features: int, out_features: int, density: float, seed: int) -> SparseWeights:
    random = torch.Generator().manual_seed(seed)
    kept = torch.rand(out_features, in_features, generator=random) < density
    starts = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0)).int()
    values = torch.randn(int(starts[-1]), generator=random).half()
    return SparseWeights(in_features, starts, kept.nonzero()[:, 1].int(), values)


def random_int8(
    bits: int, in_features: int, out_features: int, group_size: int, rounding: Rounding, seed: int
) -> Int8Weights:
    """Weights over their whole range, with zero points."""
    random = torch.Generator().manual_seed(seed)
    shape = (out_features, -(-in_features // group_size))
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    weight = torch.randint(low, high, (out_features, in_features), generator=random, dtype=torch.int8)
    zeros = torch.randint(low, high, shape, generator=random, dtype=torch.int8)
    return Int8Weights(bits, group_size, weight, torch.rand(shape, generator=random) + 0.1, zeros, rounding)


def random_fp8(in_features: int, out_features: int, block: tuple[int, int], seed: int) -> Fp8Weights:
    """Every e4m3 value but NaN, subnormals among them."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 127, (out_features, in_features), generator=random, dtype=torch.uint8)
    signs = torch.randint(0, 2, codes.shape, generator=random, dtype=torch.uint8) << 7
    shape = (-(-out_features // block[0]), -(-in_features // block[1]))
    return Fp8Weights((codes | signs).view(torch.float8_e4m3fn), torch.rand(shape, generator=random) + 0.1, block)


def example(family: str, in_features: int, out_features: int, seed: int) -> Term:
    """A matrix of any family; in_features a multiple of 32."""
    examples: dict[str, Term] = {
        "affine": random_affine(4, in_features, out_features, 32, torch.float16, seed),
        "codebook": random_codebook(8, 256, in_features, out_features, in_features, seed),
        "dense": random_dense(in_features, out_features, torch.float16, seed),
        "fp8": random_fp8(in_features, out_features, (8, 32), seed),
        "int8": random_int8(8, in_features, out_features, 32, Rounding("int", 8), seed),
        "lookup": random_lookup(3, in_features, out_features, 32, seed),
        "lowrank": random_lowrank(in_features, out_features, 5, seed),
        "sparse": random_sparse(in_features, out_features, 0.1, seed),
        "table": random_table(NF4, in_features, out_features, 32, torch.float16, seed),
    }
    return examples[family]


def codes_by_hand(codes: Tensor, bits: int, in_features: int) -> list[list[int]]:
    """Codes taken from each row's bytes read as one big integer."""
    streams = [int.from_bytes(bytes(row), "little") for row in codes.tolist()]
    return [[stream >> k * bits & 2**bits - 1 for k in range(in_features)] for stream in streams]


def affine_by_hand(weights: AffineWeights) -> Tensor:
    """scale * (code - zero) + offset in float64, [N, K]."""
    scales, zeros = weights.scales.double().tolist(), weights.zeros.double().tolist()
    offsets = (torch.zeros(weights.scales.shape) if weights.offsets is None else weights.offsets).double().tolist()
    group_size = weights.group_size
    codes = codes_by_hand(weights.codes, weights.bits, weights.in_features)
    rows = [
        [
            scales[n][k // group_size] * (code - zeros[n][k // group_size]) + offsets[n][k // group_size]
            for k, code in enumerate(row)
        ]
        for n, row in enumerate(codes)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def table_by_hand(weights: TableWeights) -> Tensor:
    """table[code] * (scale * factor) in float64, [N, K]; scales of one byte read bit by bit."""
    group_size = weights.group_size
    codes = codes_by_hand(weights.codes, weights.bits, weights.in_features)
    rows = []
    for scales, row in zip(scales_by_hand(weights.scales), codes, strict=True):
        rows.append([weights.table[code] * scales[k // group_size] * weights.factor for k, code in enumerate(row)])
    return torch.tensor(rows, dtype=torch.float64)


def scales_by_hand(scales: Tensor) -> list[list[float]]:
    if scales.dtype == torch.float8_e8m0fnu:
        return [[2.0 ** (byte - 127) for byte in row] for row in scales.view(torch.uint8).tolist()]
    if scales.dtype == torch.float8_e4m3fn:
        return [[e4m3_by_hand(byte) for byte in row] for row in scales.view(torch.uint8).tolist()]
    rows: list[list[float]] = scales.double().tolist()
    return rows


def e4m3_by_hand(byte: int) -> float:
    sign, exponent, fraction = -1.0 if byte & 128 else 1.0, byte >> 3 & 15, byte & 7
    return sign * (fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))
