"""RMSNorm, RoPE and SwiGLU against float64; native ones bit for bit across batches, threads and instruction sets."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from kernels import activation, native, norm, rope
from kernels.contract import ActivationKernel, Kernel, NormKernel, RopeKernel, RowSpec
from tests.tolerance import EPS, assert_within

ACTIVATIONS = [torch.float32, torch.bfloat16]


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def roundings(count: int, dtype: torch.dtype) -> float:
    """Relative error of `count` roundings in float32, then two to `dtype` when it is narrower."""
    return count * EPS + (2 * torch.finfo(dtype).eps if dtype != torch.float32 else 0)


def named(kernel: Kernel) -> str:
    return kernel.name


def skip_refused(kernel: Kernel, dtype: torch.dtype = torch.float32) -> None:
    reason = kernel.refuses(RowSpec(64, torch.device("cpu"), dtype))
    if reason is not None:
        pytest.skip(reason)


def exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double()
    return weight.double() * wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("kernel", norm.KERNELS, ids=named)
@pytest.mark.parametrize("shape", [(1, 1), (7, 45), (3, 5, 64), (0, 16), (2, 2048), (40, 1000)])
@pytest.mark.parametrize("dtype", ACTIVATIONS)
def test_norm(kernel: NormKernel, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The mean of squares has positive terms only, so its relative error stays within a few roundings."""
    skip_refused(kernel, dtype)
    x, weight = random(*shape).to(dtype), random(shape[-1], seed=2).to(dtype)
    expected = exact_norm(x, weight)
    assert_within(kernel.rms_norm(x, weight, 1e-5), expected, roundings(8, dtype) * expected.abs())


@pytest.mark.parametrize("kernel", norm.KERNELS, ids=named)
@pytest.mark.parametrize("shape", [(1, 1), (7, 45), (3, 5, 64), (40, 1000)])
@pytest.mark.parametrize("dtype", ACTIVATIONS)
def test_norm_of_a_sum(kernel: NormKernel, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Bug: the sum returned is not the sum that was normalized, or an addend is overwritten."""
    skip_refused(kernel, dtype)
    x, delta, weight = random(*shape).to(dtype), random(*shape, seed=3).to(dtype), random(shape[-1], seed=2).to(dtype)
    before = x.clone(), delta.clone()
    total, normed = kernel.add_rms_norm(x, delta, weight, 1e-5)
    assert torch.equal(total, x + delta)
    assert torch.equal(normed, kernel.rms_norm(total, weight, 1e-5))
    assert torch.equal(x, before[0])
    assert torch.equal(delta, before[1])


@pytest.mark.parametrize("kernel", norm.KERNELS, ids=named)
def test_norm_of_zeros_is_zero(kernel: NormKernel) -> None:
    """Bug: 0 / 0 where eps is left out."""
    skip_refused(kernel)
    assert torch.equal(kernel.rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6), torch.zeros(2, 8))


@pytest.mark.parametrize("kernel", norm.KERNELS, ids=named)
def test_norm_refuses_other_shapes(kernel: NormKernel) -> None:
    """Bug: memory read past the end of a row."""
    skip_refused(kernel)
    with pytest.raises(ValueError, match=r"\[2, 8\] cannot be scaled by a weight of \[9\]"):
        kernel.rms_norm(torch.zeros(2, 8), torch.ones(9), 1e-6)
    with pytest.raises(ValueError, match=r"\[1, 8\] cannot be added to \[2, 8\]"):
        kernel.add_rms_norm(torch.zeros(2, 8), torch.zeros(1, 8), torch.ones(8), 1e-6)


@pytest.mark.parametrize("kernel", rope.KERNELS, ids=named)
@pytest.mark.parametrize("shape", [(1, 1, 2), (7, 3, 10), (5, 4, 64), (0, 4, 64), (40, 8, 128)])
@pytest.mark.parametrize("dtype", ACTIVATIONS)
def test_rope_turns_pairs(kernel: RopeKernel, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Channels i and i + D/2 are the real and imaginary part of a number that is multiplied by exp(i angle).

    Bug: keys, of which there are fewer heads, turned by the angles of another token.
    """
    skip_refused(kernel, dtype)
    x = random(*shape).to(dtype)
    angles = random(shape[0], shape[2] // 2, seed=3)
    low, high = x.double().chunk(2, dim=-1)
    turned = torch.complex(low, high) * torch.polar(torch.ones(()).double(), angles.double())[:, None]
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    size = torch.complex(low, high).abs().repeat(1, 1, 2)  # an element may cancel; its error is that of the pair
    bound = 4 * EPS * size + roundings(0, dtype) * expected.abs()
    turned_x, turned_first = kernel.rotate_pair(x, x[:, :1], angles.cos(), angles.sin())
    assert_within(turned_x, expected, bound)
    assert torch.equal(turned_first, turned_x[:, :1])


@pytest.mark.parametrize("kernel", rope.KERNELS, ids=named)
@pytest.mark.parametrize("shape", [(2, 5), (3, 4), (1, 4)])
def test_rope_refuses_other_shapes(kernel: RopeKernel, shape: tuple[int, int]) -> None:
    skip_refused(kernel)
    with pytest.raises(ValueError, match=r"heads of \[2, 3, 8\] need angles of \[num_tokens, D / 2\]"):
        kernel.rotate_pair(torch.zeros(2, 3, 8), torch.zeros(2, 1, 8), torch.zeros(shape), torch.zeros(shape))


@pytest.mark.parametrize("kernel", activation.KERNELS, ids=named)
@pytest.mark.parametrize("shape", [(6, 33), (1, 8192), (9, 8192), (0, 5)])
@pytest.mark.parametrize("dtype", ACTIVATIONS)
def test_swiglu(kernel: ActivationKernel, shape: tuple[int, int], dtype: torch.dtype) -> None:
    skip_refused(kernel, dtype)
    gate, up = 10 * random(*shape).to(dtype), random(*shape, seed=2).to(dtype)
    gate[:1, :3] = torch.tensor([-80.0, 0.0, 80.0])  # exp under- and overflows on the way
    wide = gate.double()
    expected = wide / (1 + (-wide).exp()) * up.double()
    # exp(-gate) inherits the rounding of its argument: relative error |gate| eps
    bound = (roundings(6, dtype) + EPS * wide.abs()) * expected.abs()
    assert_within(kernel.swiglu(gate, up), expected, bound)


@pytest.mark.parametrize("kernel", activation.KERNELS, ids=named)
def test_swiglu_at_the_ends(kernel: ActivationKernel) -> None:
    """Bug: an exp that wraps around for large arguments, or that turns NaN into a number."""
    skip_refused(kernel)
    gate = torch.tensor([[-1e30, -104.0, -0.0, 104.0, math.inf, math.nan]])
    result = kernel.swiglu(gate, torch.ones(1, 6))[0].tolist()
    assert result[:5] == [0.0, pytest.approx(0.0, abs=1e-42), 0.0, 104.0, math.inf]
    assert math.isnan(result[5])


@pytest.mark.parametrize("kernel", activation.KERNELS, ids=named)
def test_swiglu_refuses_other_shapes(kernel: ActivationKernel) -> None:
    skip_refused(kernel)
    with pytest.raises(ValueError, match=r"a gate of \[1, 8\] cannot gate \[2, 8\]"):
        kernel.swiglu(torch.zeros(1, 8), torch.zeros(2, 8))


# -- the same bits, whatever runs beside a row -------------------------------------------------------------------------


def add_norm_rows(x: Tensor) -> Tensor:
    total, normed = norm.KERNELS[0].add_rms_norm(x, x.flip(-1), random(x.shape[-1], seed=2), 1e-5)
    return torch.cat((total, normed), dim=-1)


def turned_rows(x: Tensor) -> Tensor:
    heads, angles = x.view(x.shape[0], -1, 30), x[:, :15].contiguous()
    q, k = rope.KERNELS[0].rotate_pair(heads, heads[:, :7], angles.cos(), angles.sin())
    return torch.cat((q.flatten(1), k.flatten(1)), dim=-1)


def gated_rows(x: Tensor) -> Tensor:
    return activation.KERNELS[0].swiglu(10 * x, x.flip(-1))


OPS = [add_norm_rows, turned_rows, gated_rows]


@pytest.fixture
def pool_of_three() -> Iterator[None]:
    if native.MISSING is not None:
        pytest.skip(native.MISSING)
    from kernels.native import _native

    before = _native.num_threads()
    native.set_num_threads(3)
    yield
    native.set_num_threads(before)


@pytest.mark.usefixtures("pool_of_three")
@pytest.mark.parametrize("op", OPS)
def test_a_row_does_not_depend_on_its_neighbours(op: Callable[[Tensor], Tensor]) -> None:
    """Bug: lanes that straddle two rows, or a last vector computed in another way. 60 rows go to several threads."""
    x = random(60, 990)
    together = op(x)
    for i in range(60):
        assert torch.equal(op(x[i : i + 1].clone()), together[i : i + 1])


@pytest.mark.usefixtures("pool_of_three")
@pytest.mark.parametrize("op", OPS)
def test_every_instruction_set_gives_the_same_bits(op: Callable[[Tensor], Tensor]) -> None:
    from kernels.native import _native

    x, before = random(3, 990), _native.isa()
    x[0, 5] = 1e-42  # subnormals are not flushed to zero anywhere
    results = []
    try:
        for isa in _native.supported_isas():
            _native.use_isa(isa)
            results.append(op(x))
    finally:
        _native.use_isa(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.usefixtures("pool_of_three")
@pytest.mark.parametrize("op", [add_norm_rows, gated_rows])
def test_inputs_need_not_be_contiguous(op: Callable[[Tensor], Tensor]) -> None:
    """Bug: the address of a view taken for that of rows that follow each other."""
    pairs = random(4, 2, 990)
    assert torch.equal(op(pairs[:, 0]), op(pairs[:, 0].clone()))
