"""GPU kernels of the families beside affine and table, without a GPU."""

from collections.abc import Iterator

import pytest
import torch

from kernels import gpu
from kernels.contract import KernelRefused, LinearSpec, select
from kernels.gpu import decoding, transforms
from kernels.gpu.decoding import DecodingKernel
from kernels.linear.codebook.gpu import CodebookTriton
from kernels.linear.dense.gpu import DenseCublas
from kernels.linear.fp8.gpu import Fp8Triton
from kernels.linear.int8.gpu import Int8Triton, Prepared, pack_halves
from kernels.linear.lookup.gpu import LookupTriton
from kernels.linear.lowrank.gpu import LowRankCublas
from kernels.linear.registry import kernels_for
from kernels.linear.rounding import Rounding
from kernels.linear.transforms import BlockRotation, Diagonal, Hadamard, Permutation, Transform, same
from tests.kernels.gpu_checks import check_budget, check_interpreted, check_names, needs_interpreter, needs_triton
from tests.kernels.gpu_compile import Case
from tests.kernels.gpu_families_compile import BUDGET, cases
from tests.kernels.weights import random_dense, random_fp8, random_int8, random_lookup, random_lowrank
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


@needs_interpreter
def test_kernels_agree_with_their_references_under_the_interpreter() -> None:
    check_interpreted("interpreted_families", "interpreted_rotating")


@needs_triton
@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_kernels_compile_within_their_budget(
    case: Case, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a change that makes a kernel spill registers, or ask for more shared memory than there is."""
    check_budget(case, BUDGET, request, monkeypatch)


def test_the_budget_is_of_the_cases_that_exist() -> None:
    check_names(BUDGET, cases())


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


def test_a_byte_holds_the_same_channel_of_two_runs() -> None:
    """The layout by its definition. Bug: a negative code whose sign covers the other half."""
    codes = torch.randint(-8, 8, (3, 128), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    halves = pack_halves(codes, 32)  # two blocks of 2 runs of 32
    assert halves.shape == (3, 64)
    for n in range(3):
        for k in range(128):
            block, run, i = k // 64, k // 32 % 2, k % 32
            assert (int(halves[n, block * 32 + i]) >> 4 * run) & 15 == int(codes[n, k]) & 15


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_half_a_word_holds_one_code_of_each_plane(bits: int) -> None:
    """The layout by its definition. Bug: the top code's sign bit smeared over the other half."""
    codes = torch.randint(0, 1 << bits, (3, 200), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    words, planes = decoding.pack_halves(codes, bits, 16), 16 // bits
    assert words.shape == (3, 8 * -(-200 // (16 * planes)))
    for n in range(3):
        for k in range(200):
            block, plane, i = k // (16 * planes), k // 16 % planes, k % 16
            half = int(words[n, block * 8 + i // 2]) >> 16 * (i % 2)
            assert half >> bits * plane & (1 << bits) - 1 == int(codes[n, k])


@pytest.mark.parametrize("family", ["fp8", "codebook", "lookup", "int8", "sparse"])
def test_who_insists_on_triton_gets_it(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a family left out of what is tried, or its variants in the wrong order."""
    for module in ("kernels.gpu.decoding", "kernels.linear.int8.gpu", "kernels.linear.sparse.gpu"):
        monkeypatch.setattr(f"{module}.refusal", lambda *_: None)
    spec = LinearSpec(64, 32, CUDA, torch.bfloat16, family, 8, 64)
    assert select(kernels_for(family), spec).kernel.name == "triton"
    for asked in ("triton", "triton-fixed"):
        assert select(kernels_for(family), spec, asked).kernel.name == asked


def test_groups_that_no_plane_divides_are_refused() -> None:
    with pytest.raises(ValueError, match="groups of 24 channels have no packed form"):
        Fp8Triton().prepare(random_fp8(96, 5, (1, 24), seed=1))
    with pytest.raises(ValueError, match="groups of 24 channels have no packed form"):
        LookupTriton().prepare(random_lookup(2, 96, 5, 24, seed=1))


def test_transforms_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has no kernel, or would have other bits, stays as it is. Bug: a rule that the kernel does not know."""
    given: list[tuple[Transform, str]] = [
        (Rounding("e4m3", 8, 128), "RoundingTriton"),
        (Rounding("e2m1", 4, 32, scale_grid="e8m0-deviation"), "RoundingTriton"),
        (Rounding("e2m1", 4, 48, scale_grid="e8m0-deviation"), "Rounding"),
        (Hadamard(16384), "HadamardTriton"),
        (Hadamard(32768), "Hadamard"),
        (BlockRotation(torch.ones(1, 3, 3, dtype=torch.float16)), "BlockRotationTriton"),
        (Diagonal(torch.ones(3, dtype=torch.float16)), "Diagonal"),
        (Permutation(torch.arange(3)), "Permutation"),
    ]
    for transform, _ in given:
        assert transforms.on_gpu(transform, torch.device("cpu"), torch.bfloat16) is transform
    monkeypatch.setattr(transforms, "refusal", lambda *_: None)
    for transform, name in given:
        assert type(transforms.on_gpu(transform, CUDA, torch.bfloat16)).__name__ == name
    rounding = transforms.on_gpu(given[0][0], CUDA, torch.bfloat16)
    assert same((rounding,), (transforms.on_gpu(Rounding("e4m3", 8, 128), CUDA, torch.bfloat16),))
    assert rounding.describe() == given[0][0].describe()


def test_a_row_longer_than_an_integer_holds_is_cut() -> None:
    """Bug: a sum of 32 bits that overflows with the largest codes and zero points."""
    weights = random_int8(8, 40_000, 2, 40_000, Rounding("int", 8), seed=1)
    one = Int8Triton().prepare(weights)
    assert isinstance(one, Prepared)
    assert one.group_size * 128 * 256 <= 2**31 - 1 + one.group_size  # the largest sum itself is 127 * 255 a channel
    assert one.scales.shape == (2, 2)
    assert torch.equal(one.scales[0], one.scales[1])


def test_matrices_whose_activations_differ_are_not_joined() -> None:
    """Bug: k rounded by the rule of q."""
    kernel = Int8Triton()
    plain, other = (
        random_int8(8, 256, 4, 64, Rounding("int", 8, symmetric=symmetric), seed=1) for symmetric in (True, False)
    )
    short = random_int8(8, 256, 4, 32, plain.rounding, seed=1)
    assert kernel.join([kernel.prepare(plain), kernel.prepare(plain)]) is not None
    assert kernel.join([kernel.prepare(plain), kernel.prepare(other)]) is None
    assert kernel.join([kernel.prepare(plain), kernel.prepare(short)]) is None


def test_refusals_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a kernel chosen that fails at the first step."""
    spec = LinearSpec(96, 64, torch.device("cpu"), torch.bfloat16, "8-bit", 8, 96)
    assert Int8Triton().refuses(spec) == "triton kernels run on CUDA devices, not on cpu"
    monkeypatch.setattr(gpu, "MISSING", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    for width, group, reason in (
        (96, 96, None),
        (45, 45, None),
        (96, 48, "groups of 48 channels are neither a multiple of 32 nor the whole row"),
    ):
        assert Int8Triton().refuses(LinearSpec(width, 64, CUDA, torch.bfloat16, "8-bit", 8, group)) == reason
    kernels: tuple[DecodingKernel, ...] = (Fp8Triton(), CodebookTriton(), LookupTriton())
    for kernel in kernels:
        reason = "groups of 24 channels are neither a multiple of 16 nor the whole row"
        assert kernel.refuses(LinearSpec(96, 64, CUDA, torch.bfloat16, "", 8, 24)) == reason
        assert kernel.refuses(LinearSpec(96, 64, CUDA, torch.bfloat16, "", 8, 48)) is None
