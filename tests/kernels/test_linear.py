"""Every back end of every weight family against float64, on odd shapes, within the derived bound."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kernels.contract import KernelRefused, LinearKernel, LinearSpec, select
from kernels.linear import blocks
from kernels.linear.affine.layout import AffineWeights
from kernels.linear.bitstream import MAX_BITS
from kernels.linear.dense.layout import DenseWeights
from kernels.linear.int8.layout import Int8Weights
from kernels.linear.lowrank.layout import LowRankWeights
from kernels.linear.registry import kernels_for
from kernels.linear.rounding import Rounding
from kernels.linear.weights import Term
from kernels.registry import families
from tests.kernels.weights import affine_by_hand, example, random_affine, random_dense, random_int8, random_minima
from tests.tolerance import EPS, assert_within, dot_bound

SHAPES = [  # num_tokens, in_features, out_features, group_size
    (1, 64, 48, 32),
    (17, 45, 33, 16),  # a short last group, rows that end inside a byte
    (3, 4096, 7, 128),
    (5, 1, 1, 4),
    (0, 64, 8, 64),  # a step in which no logits are wanted
]


def spec_of(term: Term, dtype: torch.dtype) -> LinearSpec:
    """What the loader asks about where activations must not be rounded: the bound is that of a float product."""
    return LinearSpec(
        in_features=term.in_features,
        out_features=term.out_features,
        device=torch.device("cpu"),
        dtype=dtype,
        detail=term.describe(),
        bits=term.bits,
        group_size=term.group_size,
        exact_activations=True,
    )


def check(kernel: LinearKernel, term: Term, num_tokens: int, dtype: torch.dtype = torch.float32) -> None:
    """One kernel on one matrix; skips, with its reason, when the kernel refuses."""
    spec = spec_of(term, dtype)
    reason = kernel.refuses(spec)
    if reason is not None:
        pytest.skip(reason)
    x = torch.randn(num_tokens, term.in_features, generator=torch.Generator().manual_seed(7)).to(dtype)
    (result,) = kernel.linear(x, kernel.join([kernel.prepare(term)]))
    exact, matrix = x.double(), term.dequantize().double()
    if isinstance(term, Int8Weights):  # their product is of the activations that the format means
        exact = term.rounding.apply(x.float()).double()
    assert result.dtype == dtype
    assert_within(result, exact @ matrix.T, bound_of(term, exact, dtype), term.describe())


def bound_of(term: Term, x: Tensor, dtype: torch.dtype) -> Tensor:
    """On x W^T. Of two factors, the rounding of the inner sums goes through the outer ones, and W was rounded once."""
    matrix = term.dequantize().double()
    if not isinstance(term, LowRankWeights):
        return dot_bound(x, matrix, dtype)
    a, b = term.a.double(), term.b.double()
    rounded = dot_bound(x, b) @ a.abs().T + EPS / 2 * (x.abs() @ matrix.abs().T)
    return rounded + dot_bound(x @ b.T, a, dtype)


def named(kernel: LinearKernel) -> str:
    return kernel.name


@pytest.mark.parametrize(("num_tokens", "k", "n", "group"), SHAPES)
@pytest.mark.parametrize("bits", range(1, MAX_BITS + 1))
@pytest.mark.parametrize("kernel", kernels_for("affine"), ids=named)
def test_affine(kernel: LinearKernel, bits: int, num_tokens: int, k: int, n: int, group: int) -> None:
    check(kernel, random_affine(bits, k, n, group, torch.float16, seed=bits), num_tokens)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("zero_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kernel", kernels_for("affine"), ids=named)
def test_affine_with_float_zeros(kernel: LinearKernel, scale_dtype: torch.dtype, zero_dtype: torch.dtype) -> None:
    weights = random_affine(3, 45, 9, 16, scale_dtype, seed=3)
    check(kernel, replace(weights, zeros=(weights.zeros + 0.3).to(zero_dtype)), num_tokens=4)


@pytest.mark.parametrize("kernel", kernels_for("affine"), ids=named)
def test_affine_with_one_zero_for_all(kernel: LinearKernel) -> None:
    weights = random_affine(4, 64, 9, 16, torch.float16, seed=4)
    shared = torch.tensor([[8]], dtype=torch.uint8).expand(9, 4)  # stride 0: symmetric formats store no zeros
    check(kernel, replace(weights, zeros=shared), num_tokens=4)


@pytest.mark.parametrize(("num_tokens", "k", "n", "group"), SHAPES)
@pytest.mark.parametrize("kernel", kernels_for("affine"), ids=named)
def test_affine_with_offsets(kernel: LinearKernel, num_tokens: int, k: int, n: int, group: int) -> None:
    """Bug: offsets left out, scaled, or taken from a group whose scale is 0."""
    check(kernel, random_minima(4, k, n, group, seed=5), num_tokens)


@pytest.mark.parametrize(("num_tokens", "k", "n", "group"), SHAPES)
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", kernels_for("dense"), ids=named)
def test_dense(kernel: LinearKernel, stored: torch.dtype, num_tokens: int, k: int, n: int, group: int) -> None:
    check(kernel, random_dense(k, n, stored, seed=group), num_tokens)


@pytest.mark.parametrize(("num_tokens", "k", "n", "group"), SHAPES)
@pytest.mark.parametrize("bits", range(2, MAX_BITS + 1))
@pytest.mark.parametrize("kernel", kernels_for("int8"), ids=named)
def test_int8(kernel: LinearKernel, bits: int, num_tokens: int, k: int, n: int, group: int) -> None:
    """By token, with a zero point that follows it, and in groups of channels."""
    roundings = (Rounding("int", 8), Rounding("int", 4, symmetric=False), Rounding("int", 8, 32))
    for rounding in roundings:
        check(kernel, random_int8(bits, k, n, group, rounding, seed=bits), num_tokens)


@pytest.mark.parametrize("family", families("kernels.linear"))
def test_activations_keep_their_dtype(family: str) -> None:
    term = example(family, 96, 17, 5)
    for kernel in kernels_for(family):
        check(kernel, term, 6, torch.bfloat16)


@pytest.mark.parametrize("bits", range(1, MAX_BITS + 1))
@pytest.mark.parametrize(("k", "group"), [(64, 32), (45, 16), (7, 100), (33, 33)])
def test_dequantize_is_the_formula(bits: int, k: int, group: int) -> None:
    """The definition itself, against codes cut out of the byte stream as one big integer; one rounding is allowed."""
    weights = random_affine(bits, k, 5, group, torch.float16, seed=k)
    expected = affine_by_hand(weights)  # [5, k]
    assert_within(weights.dequantize(), expected, EPS / 2 * expected.abs())
    assert torch.equal(weights.dequantize_rows(1, 4), weights.dequantize()[1:4])
    minima = random_minima(bits, k, 5, group, seed=k)
    product = affine_by_hand(replace(minima, offsets=None)).abs()  # rounded before the offset is added
    assert_within(minima.dequantize(), affine_by_hand(minima), EPS / 2 * (product + affine_by_hand(minima).abs()))


def test_offsets_go_without_zero_points() -> None:
    """Both would be one too many: a kernel keeps one of them."""
    minima = random_minima(4, 64, 5, 32, seed=1)
    with pytest.raises(ValueError, match="weights with offsets have no zero points"):
        replace(minima, zeros=minima.zeros + 1)


@pytest.mark.parametrize(
    "term", [random_affine(5, 45, 33, 16, torch.float16, 6), random_dense(45, 33, torch.bfloat16, 6)]
)
def test_blocks_change_nothing_but_memory(monkeypatch: pytest.MonkeyPatch, term: AffineWeights | DenseWeights) -> None:
    """A matrix cut in blocks of rows, the last one short: no row is lost or multiplied twice."""
    monkeypatch.setattr(blocks, "MAX_BLOCK_ELEMENTS", 4 * 45)
    check(kernels_for(term.family)[-1], term, num_tokens=3)


def test_every_family_ends_with_its_reference_which_refuses_nothing() -> None:
    spec = LinearSpec(7, 3, torch.device("cpu"), torch.float32)
    for family in families("kernels.linear"):
        reference = kernels_for(family)[-1]
        assert reference.name == "reference"
        assert reference.refuses(spec) is None


def test_an_unknown_family_is_named_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"no family 'trellis'; it has affine, codebook"):
        kernels_for("trellis")


def test_a_kernel_asked_for_by_name_is_never_replaced() -> None:
    with pytest.raises(KernelRefused, match=r"no kernel 'native2' for .*there is: .*reference"):
        select(kernels_for("affine"), LinearSpec(7, 3, torch.device("cpu"), torch.float32), only="native2")


@dataclass(frozen=True)
class Named:
    """A kernel that serves what its reason, if any, does not refuse."""

    name: str
    reason: str | None = None

    def refuses(self, spec: object) -> str | None:
        return self.reason


def test_a_variant_answers_to_the_name_of_its_back_end() -> None:
    """Asking for 'native' and for exact activations must not end in a refusal while there is native-float."""
    kernels = (Named("native", "rounds"), Named("native-float"), Named("reference"))
    assert select(kernels, "a layer", only="native").kernel.name == "native-float"
    assert select(kernels, "a layer", only="reference").kernel.name == "reference"
    with pytest.raises(KernelRefused, match="no kernel 'nati' for a layer; there is: native, native-float"):
        select(kernels[:2], "a layer", only="nati")


@pytest.mark.parametrize("family", families("kernels.linear"))
def test_joined_matrices_give_what_each_gives_alone(family: str) -> None:
    """Results in the order of the matrices, and none of them touched by its neighbours."""
    terms = [example(family, 96, rows, rows) for rows in (17, 5)]
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(8))
    for kernel in kernels_for(family):
        if kernel.name.startswith("triton"):
            continue  # tests/kernels/interpreted.py
        prepared = [kernel.prepare(term) for term in terms]
        alone = [kernel.linear(x, kernel.join([one]))[0] for one in prepared]
        together = kernel.linear(x, kernel.join(prepared))
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("family", families("kernels.linear"))
def test_activations_of_another_width_are_refused(family: str) -> None:
    """A native kernel handed the address of narrower rows would read past them."""
    term = example(family, 96, 17, 5)
    for kernel in kernels_for(family):
        if kernel.name.startswith("triton"):
            continue  # it is no address that a Triton kernel gets on the CPU, but an error
        with pytest.raises(ValueError, match=r"\(2, 95\).*96"):
            kernel.linear(torch.zeros(2, 95), kernel.join([kernel.prepare(term)]))
