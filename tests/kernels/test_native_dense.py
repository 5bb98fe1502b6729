"""Float products in C++: every instruction set against float64, and the same bits whatever is computed beside a row."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels import native
from kernels.contract import LinearKernel, LinearSpec
from kernels.linear.affine.layout import Nested
from kernels.linear.dense.layout import DenseWeights
from kernels.linear.table.layout import SCALE_DTYPES
from kernels.linear.table.tables import BINARY, E2M1, FP4, NF4, TERNARY
from kernels.linear.weights import Term
from tests.kernels.weights import random_affine, random_dense, random_minima, random_nested, random_table
from tests.tolerance import assert_within, dot_bound

if native.MISSING is not None:
    pytest.skip(native.MISSING, allow_module_level=True)

from kernels.linear.affine.native import AffineNative, AffineNativeFloat
from kernels.linear.dense.native import DenseNative
from kernels.linear.table.native import TableNative, TableNativeFloat
from kernels.native import _native

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TABLES = {"nf4": NF4, "fp4": FP4, "e2m1": E2M1, "ternary": TERNARY, "binary": BINARY}
PACKED_SHAPES = [  # num_tokens, in_features, out_features, group_size
    (1, 64, 48, 32),
    (4, 45, 33, 16),  # a short last group, a last panel of one row block, a unit of 13 channels
    (5, 350, 70, 64),
    (13, 330, 9, 1000),  # one scale a row
    (2, 7, 1, 16),
    (5, 2100, 70, 32),  # two slabs
]
MAX_TOKENS = 33  # tiles of every size the kernels have, and halves widened for many tokens


def activations(num_tokens: int, in_features: int) -> Tensor:
    return torch.randn(num_tokens, in_features, generator=torch.Generator().manual_seed(9))


def multiply(kernel: LinearKernel, x: Tensor, *terms: Term) -> tuple[Tensor, ...]:
    return kernel.linear(x, kernel.join([kernel.prepare(term) for term in terms]))


@pytest.mark.parametrize("isa", _native.supported_isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "k", "n"), [(1, 64, 48), (17, 45, 33), (3, 4096, 7), (5, 1, 1), (0, 64, 8), (14, 600, 130)]
)
def test_dense(isa: str, dtype: torch.dtype, num_tokens: int, k: int, n: int) -> None:
    _native.use_isa(isa)
    weights, x = random_dense(k, n, dtype, seed=k), activations(num_tokens, k)
    (result,) = multiply(DenseNative(), x, weights)
    exact, matrix = x.double(), weights.weight.double()
    assert_within(result, exact @ matrix.T, dot_bound(exact, matrix), weights.describe())


def check_packed(kernel: LinearKernel, term: Term, num_tokens: int) -> None:
    x = activations(num_tokens, term.in_features)
    exact, matrix = x.double(), term.dequantize().double()
    for isa in _native.supported_isas():
        _native.use_isa(isa)
        (result,) = multiply(kernel, x, term)
        assert_within(result, exact @ matrix.T, dot_bound(exact, matrix), f"{term.describe()} on {isa}")


@pytest.mark.parametrize(("num_tokens", "k", "n", "group"), PACKED_SHAPES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_affine(bits: int, num_tokens: int, k: int, n: int, group: int) -> None:
    """Integer zero points that differ, float ones, and one for all, each unpacked in a way of its own."""
    weights = random_affine(bits, k, n, group, torch.float16, seed=bits)
    one = torch.tensor([[2 ** (bits - 1)]], dtype=torch.uint8).expand(weights.zeros.shape)
    for zeros in (weights.zeros, weights.zeros + 0.3, one):
        check_packed(AffineNativeFloat(), replace(weights, zeros=zeros), num_tokens)
    check_packed(AffineNativeFloat(), random_minima(bits, k, n, group, seed=bits), num_tokens)


@pytest.mark.parametrize("group", [16, 32, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_nested_scales(bits: int, group: int) -> None:
    """Bug: a step of the neighbouring row or of the superblock before; bytes taken without their sign. The K types of
    GGUF: with minima, and without."""
    nested = random_nested(bits, 768, 37, group, seed=bits)
    kept = nested.nested
    assert kept is not None
    plain = replace(nested, offsets=None, nested=Nested(kept.scales, kept.scale_steps))
    for weights in (nested, replace(plain, zeros=nested.zeros + 3)):
        for num_tokens in (1, 5):
            check_packed(AffineNativeFloat(), weights, num_tokens)
        packed = AffineNativeFloat().prepare(weights).num_bytes
        assert packed < AffineNativeFloat().prepare(replace(weights, nested=None)).num_bytes
        check_same_bits(AffineNative(), weights)


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("table", TABLES)
def test_table(table: str, scale_dtype: torch.dtype) -> None:
    """Entries are multiplied as they are: NF4 rounded to the integers of the other kernels exceeds the bound."""
    for num_tokens, k, n, group in PACKED_SHAPES:
        check_packed(TableNativeFloat(), random_table(TABLES[table], k, n, group, scale_dtype, seed=k), num_tokens)


def check_same_bits(kernel: LinearKernel, *terms: Term) -> None:
    """One result for any number of tokens at once, any number of threads and any instruction set."""
    x = activations(MAX_TOKENS, terms[0].in_features)
    joined = kernel.join([kernel.prepare(term) for term in terms])
    expected = kernel.linear(x, joined)
    for isa in _native.supported_isas():
        _native.use_isa(isa)
        for num_threads in (1, 2):
            _native.set_num_threads(num_threads)
            for num_tokens in range(1, MAX_TOKENS + 1):
                some = kernel.linear(x[MAX_TOKENS - num_tokens :], joined)
                assert all(torch.equal(a, b[-num_tokens:]) for a, b in zip(some, expected, strict=True)), (
                    isa,
                    num_threads,
                    num_tokens,
                )


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_gives_the_same_bits(dtype: torch.dtype) -> None:
    check_same_bits(DenseNative(), random_dense(300, 70, dtype, 1), random_dense(300, 9, torch.float32, 2))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_affine_gives_the_same_bits(bits: int) -> None:
    terms = [random_affine(bits, 300, rows, group, torch.float16, rows) for rows, group in ((70, 64), (9, 32))]
    check_same_bits(AffineNativeFloat(), *terms, random_minima(bits, 300, 40, 48, 3))


@pytest.mark.parametrize("table", TABLES)
def test_table_gives_the_same_bits(table: str) -> None:
    terms = [random_table(TABLES[table], 300, rows, group, torch.float16, rows) for rows, group in ((70, 64), (9, 300))]
    check_same_bits(TableNativeFloat(), *terms)


@pytest.mark.parametrize("isa", _native.supported_isas())
@pytest.mark.parametrize("k", [110, 330])
def test_ternary_codes_five_to_a_byte(isa: str, k: int) -> None:
    """The form that the int8 kernels prefer is read by the float ones too, in units of 20 channels."""
    _native.use_isa(isa)
    kernel, weights, x = TableNativeFloat(), random_table(TERNARY, k, 70, k, torch.float16, k), activations(7, k)
    five, two = TableNative().prepare(weights), kernel.prepare(weights)
    assert five.num_bytes < two.num_bytes
    joined = kernel.join([five])
    (result,) = kernel.linear(x, joined)
    exact, matrix = x.double(), weights.dequantize().double()
    assert_within(result, exact @ matrix.T, dot_bound(exact, matrix))
    assert torch.equal(kernel.linear(x[6:], joined)[0], result[6:])


@pytest.mark.parametrize("isa", _native.supported_isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_stay_where_they_are(isa: str, dtype: torch.dtype) -> None:
    """One NaN of a weight reaches its row alone, and the zeros that fill up a panel never meet an infinity."""
    _native.use_isa(isa)
    weights, x = random_dense(20, 33, dtype, seed=3), activations(15, 20)
    weights.weight[30, 4] = torch.nan
    x[2, 7] = torch.inf
    (result,) = multiply(DenseNative(), x, weights)
    finite = torch.ones(15, 33, dtype=torch.bool)
    finite[2], finite[:, 30] = False, False
    assert torch.equal(result.isfinite(), finite)


def test_weights_that_are_a_view_of_others() -> None:
    """Half of a fused matrix, and one that was turned: addresses alone would read their neighbours."""
    whole = random_dense(64, 40, torch.float16, 4).weight
    for view in (whole[:, :32], whole[10:30], whole.t()):
        x = activations(2, view.shape[1])
        copy = view.clone(memory_format=torch.contiguous_format)
        results = [multiply(DenseNative(), x, DenseWeights(weight))[0] for weight in (view, copy)]
        assert torch.equal(*results)


def test_activations_that_are_a_view_of_others() -> None:
    weights, x = random_dense(32, 9, torch.float16, 4), activations(4, 64)[:, 16:48]
    assert torch.equal(*multiply(DenseNative(), x, weights), *multiply(DenseNative(), x.clone(), weights))


def test_matrices_of_other_widths_go_one_by_one() -> None:
    kernel = DenseNative()
    assert kernel.join([kernel.prepare(random_dense(k, 9, torch.float16, 4)) for k in (32, 64)]) is None


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (LinearSpec(8, 8, torch.device("cuda"), torch.float32), "on the CPU"),
        (LinearSpec(8, 8, torch.device("cpu"), torch.bfloat16), "float32"),
    ],
)
def test_refusals(spec: LinearSpec, reason: str) -> None:
    refusal = DenseNative().refuses(spec)
    assert refusal is not None
    assert reason in refusal
