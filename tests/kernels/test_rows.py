"""RMSNorm, RoPE and SwiGLU against float64."""

import pytest
import torch

from kernels import activation, norm, rope
from kernels.contract import ActivationKernel, NormKernel, RopeKernel
from tests.tolerance import EPS, assert_within

ACTIVATIONS = [torch.float32, torch.bfloat16]


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def roundings(count: int, dtype: torch.dtype) -> float:
    """Relative error of `count` roundings in float32, then two to `dtype` when it is narrower."""
    return count * EPS + (2 * torch.finfo(dtype).eps if dtype != torch.float32 else 0)


@pytest.mark.parametrize("kernel", norm.KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("shape", [(1, 1), (7, 45), (3, 5, 64), (0, 16)])
@pytest.mark.parametrize("dtype", ACTIVATIONS)
def test_norm(kernel: NormKernel, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The mean of squares has positive terms only, so its relative error stays within a few roundings."""
    x, weight = random(*shape).to(dtype), random(shape[-1], seed=2).to(dtype)
    wide = x.double()
    expected = weight.double() * wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert_within(kernel.rms_norm(x, weight, 1e-5), expected, roundings(8, dtype) * expected.abs())


@pytest.mark.parametrize("kernel", norm.KERNELS, ids=lambda kernel: kernel.name)
def test_norm_of_zeros_is_zero(kernel: NormKernel) -> None:
    """Bug: 0 / 0 where eps is left out."""
    assert torch.equal(kernel.rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6), torch.zeros(2, 8))


@pytest.mark.parametrize("kernel", rope.KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("shape", [(1, 1, 2), (7, 3, 10), (5, 4, 64)])
@pytest.mark.parametrize("dtype", ACTIVATIONS)
def test_rope_turns_pairs(kernel: RopeKernel, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Channels i and i + D/2 are the real and imaginary part of a number that is multiplied by exp(i angle)."""
    x = random(*shape).to(dtype)
    angles = random(shape[0], shape[2] // 2, seed=3)
    low, high = x.double().chunk(2, dim=-1)
    turned = torch.complex(low, high) * torch.polar(torch.ones(()).double(), angles.double())[:, None]
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    size = torch.complex(low, high).abs().repeat(1, 1, 2)  # an element may cancel; its error is that of the pair
    bound = 4 * EPS * size + roundings(0, dtype) * expected.abs()
    assert_within(kernel.rotate(x, angles.cos(), angles.sin()), expected, bound)


@pytest.mark.parametrize("kernel", activation.KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("dtype", ACTIVATIONS)
def test_swiglu(kernel: ActivationKernel, dtype: torch.dtype) -> None:
    gate, up = 10 * random(6, 33).to(dtype), random(6, 33, seed=2).to(dtype)
    gate[0, :3] = torch.tensor([-80.0, 0.0, 80.0])  # exp under- and overflows on the way
    wide = gate.double()
    expected = wide / (1 + (-wide).exp()) * up.double()
    # exp(-gate) inherits the rounding of its argument: relative error |gate| eps
    bound = (roundings(6, dtype) + EPS * wide.abs()) * expected.abs()
    assert_within(kernel.swiglu(gate, up), expected, bound)
