"""The Triton kernels of int8, fp8, codebook, lookup and sparse weights against their references, under Triton's
interpreter: test_gpu_families.py runs this file in a process of its own. Shapes are tiny and odd."""

import importlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.gpu import decoding, transforms
from kernels.gpu.decoding import DecodingKernel
from kernels.gpu.tiles import cut
from kernels.gpu.transforms import BlockRotationTriton, HadamardTriton, RoundingTriton, has_kernel
from kernels.linear.codebook.gpu import CodebookTriton
from kernels.linear.codebook.layout import CodebookWeights
from kernels.linear.fp8.gpu import Fp8Triton
from kernels.linear.fp8.layout import Fp8Weights
from kernels.linear.int8 import gpu as int8_gpu
from kernels.linear.int8.gpu import ByChannels, Int8Triton, Prepared
from kernels.linear.int8.layout import Int8Weights
from kernels.linear.lookup.gpu import LookupTriton
from kernels.linear.lookup.layout import LookupWeights
from kernels.linear.rounding import Rounding
from kernels.linear.sparse import gpu as sparse_gpu
from kernels.linear.sparse.gpu import SparseTriton
from kernels.linear.sparse.layout import SparseWeights
from kernels.linear.transforms import BlockRotation, Hadamard
from tests.kernels.weights import random_codebook, random_fp8, random_int8, random_lookup, random_sparse
from tests.tolerance import EPS, assert_within, dot_bound

EPS_BF16 = torch.finfo(torch.bfloat16).eps
N = 19  # not a whole tile of rows


@pytest.fixture(autouse=True)
def _products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bfloat16 as 16-bit integers, and its tl.dot multiplies those: Triton 3.9. Its products of
    integers, which numpy takes one by one, are exact in floats of 64 bits too."""
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")

    def wide(operand: Any) -> Any:
        if operand.data.dtype == np.int8:
            return operand.data.astype(np.float64)
        if operand.data.dtype == np.float32:
            return operand.data
        assert operand.data.dtype == np.uint16
        return (operand.data.astype(np.uint32) << 16).view(np.float32)

    def dot(_: Any, a: Any, b: Any, d: Any, *__: Any) -> Any:
        return interpreter.TensorHandle(np.matmul(wide(a), wide(b)).astype(d.data.dtype) + d.data, d.dtype.scalar)

    convert = interpreter._convert_float

    def convert_subnormal(data: Any, source: Any, target: Any, mode: Any) -> Any:
        """It misreads subnormal bfloat16, which are float32 cut off."""
        if str(source) == "bf16" and str(target) == "fp32":
            return data.astype(np.uint32) << 16
        return convert(data, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", convert_subnormal)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def activations(num_tokens: int, width: int) -> Tensor:
    """Tokens of other sizes and other middles."""
    random = torch.Generator().manual_seed(width)
    x = torch.randn(num_tokens, width, generator=random) * torch.rand(num_tokens, 1, generator=random) * 3
    return (x + torch.randn(num_tokens, 1, generator=random)).bfloat16()


# -- int8 --------------------------------------------------------------------------------------------------------------


def fixed(scale: float, zero: int = 0, bits: int = 8) -> Rounding:
    zeros = torch.tensor([float(zero)]) if zero else None
    return Rounding("int", bits, symmetric=zero == 0, scale=torch.tensor([scale]), zero=zeros)


ROUNDINGS = {
    "token": Rounding("int", 8),
    "token, asymmetric": Rounding("int", 8, symmetric=False),
    "token, 5 bits, asymmetric": Rounding("int", 5, symmetric=False),
    "fixed": fixed(0.0173),
    "fixed, 4 bits, asymmetric": fixed(0.25, 7, bits=4),
}


def prepared(weights: Int8Weights) -> Prepared:
    found = Int8Triton().prepare(weights)
    assert isinstance(found, Prepared)
    return found


@pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=list(ROUNDINGS))
def test_codes_are_those_of_the_format(rounding: Rounding, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, from tiny to huge tokens. Bug: a reciprocal in place of a division, ties away from zero, a NaN that
    disappears, channels of padding that are counted."""
    width, run = 300, 128
    monkeypatch.setattr(int8_gpu, "ROUND_BLOCK", 256)  # two blocks
    x = activations(16, width) * torch.exp2(torch.linspace(-130, 120, 16)).bfloat16().unsqueeze(1)
    x[3], x[4, 0], x[5] = 0.0, -0.0, x[5].abs()
    step = 1.0 if rounding.scale is None else float(rounding.scale)
    x[6] = step * (torch.arange(width) - width // 2 + 0.5)  # ties, as far as floats can be
    tokens = prepared(random_int8(8, width, N, width, rounding, seed=1)).tokens
    codes, scales, zeros, counts = int8_gpu.round_tokens(x, tokens)
    found = (codes[:, :width].float() - zeros[:, None]) * scales[:, None]
    assert torch.equal(found, rounding.apply(x.float()))
    assert not codes[:, width:].any()
    assert torch.equal(counts, codes.view(16, -1, run).sum(-1, dtype=torch.int32))
    x[2, 7] = torch.nan
    assert bool(int8_gpu.round_tokens(x, tokens)[1][2].isnan())


def check_int8(weights: Int8Weights, num_tokens: int) -> None:
    """Sums of groups are exact. What is rounded, by eps/2 each: a group's sum as a float, its product with the scale
    and what it is added to; the row's sum for the zero point, its product and what it is taken off; the parts of a
    split; the product with the token's scale."""
    matrix, x = prepared(weights), activations(num_tokens, weights.in_features)
    tokens = int8_gpu.round_tokens(x, matrix.tokens)
    y = torch.full((num_tokens, weights.out_features), torch.nan)
    int8_gpu.multiply(tokens, matrix, y, is_fixed=False)
    near = weights.rounding.apply(x.float()).double()  # [num_tokens, K], with the token's scale rounded in
    codes, scales, zeros, _ = tokens
    exact = (codes[:, : weights.in_features].double() - zeros[:, None]) * scales.double()[:, None]
    assert_within(near, exact, EPS * exact.abs())
    dequantized = weights.dequantize().double()
    by_code = replace(weights, scales=torch.ones_like(weights.scales)).dequantize().double()
    by_code *= weights.scales.double().repeat_interleave(weights.group_size, 1)[:, : weights.in_features]
    assert_within(dequantized, by_code, EPS * by_code.abs())
    num_roundings = weights.num_groups + 16 + 8
    sizes = (codes[:, : weights.in_features].double().abs() + zeros.abs()[:, None]) * scales.double()[:, None]
    bound = num_roundings * EPS / 2 * (sizes @ by_code.abs().T)
    assert_within(y, exact @ by_code.T, bound, weights.describe())


@pytest.mark.parametrize(("bits", "num_tokens"), [(4, 3), (8, 10), (8, 17), (4, 130)])
def test_int8_rows(bits: int, num_tokens: int) -> None:
    """A scale a row. Bug: halves of a byte exchanged, or a short last block read past its end."""
    weights = random_int8(bits, 700, N, 700, ROUNDINGS["token"], seed=bits)
    check_int8(replace(weights, zeros=None), num_tokens)


@pytest.mark.parametrize(
    ("rounding", "bits", "group", "num_tokens"),
    [
        ("token", 4, 96, 3),
        ("token", 8, 32, 17),
        ("token, asymmetric", 3, 128, 66),
        ("token, asymmetric", 8, 300, 9),
        ("token, 5 bits, asymmetric", 4, 300, 3),
        ("fixed", 8, 300, 17),
        ("fixed, 4 bits, asymmetric", 8, 96, 3),
    ],
)
def test_int8_groups_with_zero_points(rounding: str, bits: int, group: int, num_tokens: int) -> None:
    """Bug: a zero point counted for channels that are padding, twice in a split, or with its neighbour's scale."""
    check_int8(random_int8(bits, 300, N, group, ROUNDINGS[rounding], seed=bits), num_tokens)


def test_int8_results_are_bfloat16_for_each_matrix() -> None:
    kernel, x = Int8Triton(), activations(3, 64)
    terms = [random_int8(8, 64, rows, 32, ROUNDINGS["token"], seed=rows) for rows in (5, 17)]
    joined = kernel.join([kernel.prepare(term) for term in terms])
    assert joined is not None
    for term, result in zip(terms, kernel.linear(x, joined), strict=True):
        exact = term.rounding.apply(x.float()).double() @ term.dequantize().double().T
        assert result.dtype == torch.bfloat16
        assert_within(result, exact, EPS_BF16 * exact.abs() + 1e-3)
    assert kernel.linear(activations(0, 64), joined)[0].shape == (0, 5)


def test_a_fixed_row_of_int8_does_not_depend_on_its_batch() -> None:
    kernel, x = Int8Triton(fixed=True), activations(40, 1100)
    joined = kernel.join([kernel.prepare(random_int8(4, 1100, N, 128, ROUNDINGS["token"], seed=5))])
    assert joined is not None
    (whole,) = kernel.linear(x, joined)
    for rows in (1, 17):
        assert torch.equal(kernel.linear(x[:rows], joined)[0], whole[:rows])


def test_activations_with_a_scale_for_each_group_meet_weights_as_floats() -> None:
    """Rounded as the format says and once more to bfloat16, by EPS_BF16 where the interpreter cuts off."""
    kernel, x = Int8Triton(), activations(3, 128)
    term = random_int8(8, 128, N, 64, Rounding("int", 8, channels=32), seed=1)
    one = kernel.prepare(term)
    assert isinstance(one, ByChannels)
    joined = kernel.join([one])
    assert joined is not None
    near, matrix = term.rounding.apply(x.float()).double(), term.dequantize().double()
    bound = 2 * EPS_BF16 * (near.abs() @ matrix.abs().T)
    assert_within(kernel.linear(x, joined)[0], near @ matrix.T, bound + EPS_BF16 * (near @ matrix.T).abs())


def test_every_entry_is_reached() -> None:
    for tiles in (int8_gpu.WHOLE_ROWS, int8_gpu.GROUPS, int8_gpu.GROUPS_WITH_ZEROS):
        assert tuple(cut(tiles, num_tokens, N, 9).tile for num_tokens in (1, 9, 17, 65)) == tiles


# -- what is decoded ---------------------------------------------------------------------------------------------------


def check_decoded(kernel: Any, weights: Fp8Weights | CodebookWeights | LookupWeights, num_tokens: int) -> None:
    """A sum of exact products, each run of which is scaled: by eps/2, and its scale's product in the definition by as
    much. Entries of books and tables are rounded to bfloat16; the interpreter cuts off."""
    matrix, x = kernel.prepare(weights), activations(num_tokens, weights.in_features)
    y = torch.full((num_tokens, weights.out_features), torch.nan)
    decoding.multiply(x, matrix, y)
    exact, dense = x.double(), weights.dequantize().double()
    bound = dot_bound(exact, dense) + EPS * (exact.abs() @ dense.abs().T)
    if not isinstance(weights, Fp8Weights):
        bound += EPS_BF16 * (exact.abs() @ dense.abs().T)
    assert_within(y, exact @ dense.T, bound, weights.describe())


def test_every_e4m3_is_decoded_exactly() -> None:
    """Bug: a sign lost, a subnormal taken for 0, bytes exchanged. Rows of one weight meet activations of 1 and 0."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 127) != 127].repeat_interleave(16).view(-1, 16)  # [254, 16]
    weights = Fp8Weights(codes.view(torch.float8_e4m3fn), torch.ones(1, 1), (254, 16))
    y = torch.full((1, 254), torch.nan)
    x = torch.zeros(1, 16, dtype=torch.bfloat16)
    for k in (3, 10):
        x[0, k] = 1
    decoding.multiply(x, Fp8Triton().prepare(weights), y)
    assert torch.equal(y[0], 2 * weights.weight[:, 0].float())


@pytest.mark.parametrize(
    ("block", "scale_dtype", "num_tokens"),
    [
        ((N, 300), torch.float32, 3),  # a scale for the tensor
        ((1, 300), torch.float16, 10),  # a row
        ((8, 128), torch.float32, 17),
        ((8, 64), torch.float32, 130),
        ((1, 32), torch.float8_e8m0fnu, 3),
    ],
)
def test_fp8(block: tuple[int, int], scale_dtype: torch.dtype, num_tokens: int) -> None:
    """Bug: the scale of the block beside or above, a short last block read past its end."""
    weights = random_fp8(300, N, block, seed=1)
    if scale_dtype == torch.float8_e8m0fnu:
        exponents = torch.randint(120, 130, weights.scales.shape, dtype=torch.uint8)
        weights = replace(weights, scales=exponents.view(scale_dtype))
    else:
        weights = replace(weights, scales=weights.scales.to(scale_dtype))
    check_decoded(Fp8Triton(), weights, num_tokens)


@pytest.mark.parametrize(("vector_size", "num_vectors"), [(4, 200), (8, 256), (8, 65536)])
def test_codebook(vector_size: int, num_vectors: int) -> None:
    """Bug: codes of 32,768 and more, stored as negative numbers, read from before the book."""
    for group, num_tokens in ((304, 3), (32, 17), (304, 66)):
        check_decoded(CodebookTriton(), random_codebook(vector_size, num_vectors, 304, N, group, seed=3), num_tokens)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_lookup(bits: int) -> None:
    """Bug: the table of the neighbouring group, or of the row above; a code of 1 bit whose table has 4 entries."""
    for group, num_tokens in ((300, 3), (16, 17)):
        check_decoded(LookupTriton(), random_lookup(bits, 300, N, group, seed=bits), num_tokens)


def test_decoded_results_are_bfloat16_for_each_matrix() -> None:
    kernel: DecodingKernel = Fp8Triton()
    x, terms = activations(3, 64), [random_fp8(64, rows, (8, 32), seed=rows) for rows in (5, 17)]
    results = kernel.linear(x, kernel.join([Fp8Triton().prepare(term) for term in terms]))
    for term, result in zip(terms, results, strict=True):
        exact = x.double() @ term.dequantize().double().T
        sizes = x.double().abs() @ term.dequantize().double().abs().T
        assert result.dtype == torch.bfloat16
        assert_within(result, exact, EPS_BF16 * exact.abs() + 2**-18 * sizes)


def test_a_fixed_row_of_what_is_decoded_does_not_depend_on_its_batch() -> None:
    kernel, x = Fp8Triton(fixed=True), activations(20, 1100)
    joined = kernel.join([kernel.prepare(random_fp8(1100, N, (8, 128), seed=5))])
    (whole,) = kernel.linear(x, joined)
    for rows in (1, 17):
        assert torch.equal(kernel.linear(x[:rows], joined)[0], whole[:rows])


# -- sparse ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("density", "num_tokens"), [(0.0, 1), (0.05, 3), (0.4, 9), (0.05, 70)])
def test_sparse(density: float, num_tokens: int) -> None:
    """Every product is rounded, by eps/2, beside their sum. Bug: an empty row that takes entries of the next, entries
    beyond the first chunk, a column of the token beside."""
    weights, x = random_sparse(300, N, density, seed=1), activations(num_tokens, 300)
    first, stop = (int(start) for start in weights.starts[3:5])
    starts = torch.where(torch.arange(N + 1) > 3, weights.starts - (stop - first), weights.starts).int()
    columns, values = (torch.cat((kept[:first], kept[stop:])) for kept in (weights.columns, weights.values))
    weights = SparseWeights(300, starts, columns, values)  # row 3 is empty
    y = torch.full((num_tokens, N), torch.nan)
    sparse_gpu.multiply(x.t().contiguous(), weights, y)
    exact, dense = x.double(), weights.dequantize().double()
    bound = dot_bound(exact, dense) + EPS / 2 * (exact.abs() @ dense.abs().T)
    assert_within(y, exact @ dense.T, bound, weights.describe())


def test_sparse_results_are_bfloat16_and_a_fixed_row_does_not_depend_on_its_batch() -> None:
    kernel, x = SparseTriton(fixed=True), activations(20, 300)
    joined = kernel.join([kernel.prepare(random_sparse(300, rows, 0.2, seed=rows)) for rows in (5, N)])
    whole = kernel.linear(x, joined)
    assert [(y.dtype, y.shape) for y in whole] == [(torch.bfloat16, (20, 5)), (torch.bfloat16, (20, N))]
    assert torch.equal(kernel.linear(x[:1], joined)[1], whole[1][:1])
    assert kernel.linear(activations(0, 300), joined)[0].shape == (0, 5)


# -- transforms of activations -----------------------------------------------------------------------------------------

ONE = torch.ones(1)
RULES: dict[str, dict[str, Any]] = {
    "e4m3 token": {"grid": "e4m3", "bits": 8},
    "e4m3 groups": {"grid": "e4m3", "bits": 8, "channels": 128},
    "e4m3 groups, powers of two": {"grid": "e4m3", "bits": 8, "channels": 128, "scale_grid": "e8m0-up"},
    "e4m3, fixed": {"grid": "e4m3", "bits": 8, "scale": 0.013 * ONE},
    "MXFP8": {"grid": "e4m3", "bits": 8, "channels": 32, "scale_grid": "e8m0"},
    "MXFP4": {"grid": "e2m1", "bits": 4, "channels": 32, "scale_grid": "e8m0"},
    "NVFP4": {"grid": "e2m1", "bits": 4, "channels": 16, "scale_grid": "e4m3", "scale_unit": 0.0021 * ONE},
    "FP-Quant": {"grid": "e2m1", "bits": 4, "channels": 32, "scale_grid": "e8m0-third"},
    "QuEST": {"grid": "e2m1", "bits": 4, "channels": 32, "scale_grid": "e8m0-deviation"},
    "int groups": {"grid": "int", "bits": 8, "channels": 48},
    "int groups, asymmetric": {"grid": "int", "bits": 5, "channels": 48, "symmetric": False},
    "int, fixed": {"grid": "int", "bits": 8, "symmetric": False, "scale": 0.031 * ONE, "zero": -77.0 * ONE},
}


@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
def test_activations_are_rounded_as_their_format_says(rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, from tiny to huge tokens. Bug: a subnormal scale, half way to the wrong side, a scale of the wrong
    group, a NaN that disappears."""
    monkeypatch.setattr(transforms, "MOST_CHANNELS", 256)  # two steps for a token
    rounding, fast = Rounding(**rule), RoundingTriton(**rule)
    assert has_kernel(rounding)
    highest = 50 if rounding.scale_grid == "e8m0-deviation" else 110  # squares are finite
    x = activations(9, 480) * torch.exp2(torch.linspace(-140, highest, 9)).bfloat16().unsqueeze(1)
    x[3], x[4, 0], x[5] = 0.0, -0.0, x[5].abs()
    steps = torch.arange(480) % 32 * (0.25 if rounding.scale is None else 0.25 * float(rounding.scale))
    x[6] = torch.where(torch.arange(480) % 32 == 31, 6, steps)  # ties, as far as floats can be
    found, expected = fast.apply(x.float()), rounding.apply(x.float())
    assert torch.equal(found.nan_to_num(3e38), expected.nan_to_num(3e38))
    x[7, 100] = torch.nan
    rounded = fast.apply(x)
    assert rounded.dtype == torch.bfloat16
    assert bool(rounded[7, 100].isnan())
    assert torch.equal(rounded[8], fast.apply(x[8:9])[0])


@pytest.mark.parametrize("block", [1, 2, 64])
def test_hadamard_blocks(block: int) -> None:
    """To the bit. Bug: levels in another order, or a block that mixes with its neighbour."""
    x = activations(1, 192).float()
    assert torch.equal(HadamardTriton(block).apply(x), Hadamard(block).apply(x))
    assert HadamardTriton(block).apply(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="192 channels are not whole Hadamard blocks of 128"):
        HadamardTriton(128).apply(x)


@pytest.mark.parametrize(("num_runs", "size"), [(1, 12), (5, 36), (2, 90)])
def test_rotations(num_runs: int, size: int) -> None:
    """Bug: the matrix of the run beside, or turned over; the last channels of a run, which are no whole tile, lost."""
    x = activations(18, size * max(2, num_runs)).float()
    matrices = torch.randn(num_runs, size, size, generator=torch.Generator().manual_seed(size))
    found = BlockRotationTriton(matrices).apply(x)
    runs = x.double().view(18, -1, size)
    exact = torch.einsum("rij,trj->tri", matrices.double().expand(runs.shape[1], size, size), runs)
    sizes = torch.einsum("rij,trj->tri", matrices.double().square().expand(runs.shape[1], size, size), runs.square())
    assert_within(found, exact.flatten(1), 4 * EPS * size**0.5 * sizes.sqrt().flatten(1))
    assert_within(found, BlockRotation(matrices).apply(x), 8 * EPS * size**0.5 * sizes.sqrt().flatten(1))
    assert torch.equal(BlockRotationTriton(matrices).apply(x[:1]), found[:1])
