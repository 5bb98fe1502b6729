"""GPU kernels of the families beside affine and table, without a GPU."""

from collections.abc import Iterator

import pytest
import torch

from kernels.contract import KernelRefused, LinearSpec, select
from kernels.linear.dense.gpu import DenseCublas
from kernels.linear.lowrank.gpu import LowRankCublas
from kernels.linear.registry import kernels_for
from tests.kernels.weights import random_dense, random_lowrank
from tests.tolerance import assert_within, dot_bound

CUDA = torch.device("cuda")
EPS_BF16 = torch.finfo(torch.bfloat16).eps


def activations(num_tokens: int, width: int) -> torch.Tensor:
    return torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(7)).bfloat16()


@pytest.fixture(autouse=True)
def _sums() -> Iterator[None]:
    """prepare sets it; it is the whole process's."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    yield
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dense_products_are_a_librarys(dtype: torch.dtype, fixed: bool) -> None:
    """The library's own sums, with weights rounded once. Bug: the last tile's padding among the results."""
    kernel, x = DenseCublas(fixed), activations(19, 45)
    terms = [random_dense(45, rows, dtype, seed=rows) for rows in (5, 17)]
    results = kernel.linear(x, kernel.join([kernel.prepare(term) for term in terms]))
    for term, result in zip(terms, results, strict=True):
        exact, matrix = x.double(), term.dequantize().double()
        rounded = 0.0 if dtype == torch.bfloat16 else EPS_BF16 / 2 * (exact.abs() @ matrix.abs().T)
        assert_within(result, exact @ matrix.T, dot_bound(exact, matrix, torch.bfloat16) + rounded)
    with pytest.raises(ValueError, match=r"\(2, 44\).*45"):
        kernel.linear(activations(2, 44), kernel.join([kernel.prepare(terms[0])]))
    assert kernel.linear(activations(0, 45), kernel.join([kernel.prepare(terms[0])]))[0].shape == (0, 5)


def test_dense_weights_in_bfloat16_are_not_copied() -> None:
    """Bug: a head that is the embedding kept twice; parts of sums that the library may add in bfloat16."""
    weights = random_dense(32, 5, torch.bfloat16, seed=1)
    assert DenseCublas().prepare(weights).weight.data_ptr() == weights.weight.data_ptr()
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction


@pytest.mark.parametrize("fixed", [False, True])
def test_lowrank_products_are_a_librarys(fixed: bool) -> None:
    """Both factors are rounded, and what lies between them once for its own sum and once as it is kept."""
    kernel, x, weights = LowRankCublas(fixed), activations(19, 45), random_lowrank(45, 7, 5, seed=1)
    (result,) = kernel.linear(x, kernel.join([kernel.prepare(weights)]))
    exact, a, b = x.double(), weights.a.double(), weights.b.double()
    sizes = exact.abs() @ b.abs().T @ a.abs().T
    assert_within(result, exact @ b.T @ a.T, (2 * EPS_BF16 + 2**-20) * sizes + EPS_BF16 * (exact @ b.T @ a.T).abs())


def test_a_fixed_row_does_not_depend_on_its_batch() -> None:
    """Bug: the product's shape, and with it the order of its sums, still that of the step."""
    kernel, x = DenseCublas(fixed=True), activations(40, 512)
    joined = kernel.join([kernel.prepare(random_dense(512, 24, torch.float16, seed=2))])
    (whole,) = kernel.linear(x, joined)
    for rows in (1, 16, 17):
        assert torch.equal(kernel.linear(x[:rows], joined)[0], whole[:rows])


@pytest.mark.parametrize("family", ["dense", "lowrank"])
@pytest.mark.parametrize("asked", ["triton", "triton-fixed"])
def test_who_insists_on_triton_gets_the_library(family: str, asked: str) -> None:
    """Bug: a model with one dense layer refused, though nothing serves that layer better; or one whose rows must not
    depend on their batch given products that do."""
    spec = LinearSpec(64, 32, CUDA, torch.bfloat16, family, 16, 64)
    assert select(kernels_for(family), spec, asked).kernel.name == f"{asked}-cublas"
    with pytest.raises(KernelRefused, match="takes bfloat16 activations"):
        select(kernels_for(family), LinearSpec(64, 32, CUDA, torch.float32, family, 16, 64), asked)
    with pytest.raises(KernelRefused, match="cuBLAS runs on CUDA devices, not on cpu"):
        select(kernels_for(family), LinearSpec(64, 32, torch.device("cpu"), torch.bfloat16, family, 16, 64), asked)
