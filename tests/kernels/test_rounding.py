"""Activations rounded as formats say: every code that comes out, against the definition computed by search."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from kernels.linear.int8.layout import Int8Weights
from kernels.linear.rounding import Rounding
from kernels.linear.transforms import same
from tests.kernels.weights import e4m3_by_hand

E4M3 = sorted({e4m3_by_hand(byte) for byte in range(256) if byte & 0x7F != 0x7F})
E2M1 = sorted({sign * value for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0) for sign in (1, -1)})


def nearest(value: float, grid: list[float]) -> set[float]:
    """The grid's values closest to `value`: two where it lies in the middle."""
    distances = [(abs(Fraction(value) - Fraction(entry)), entry) for entry in grid]
    least = min(distances)[0]
    return {entry for distance, entry in distances if distance == least}


def activations(scale: float = 1.0) -> Tensor:
    """[3, 96]: rows of other sizes, zeros, and one outlier."""
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(5)) * torch.tensor([[0.01], [1.0], [30.0]]) * scale
    x[1, 7] = 40.0
    x[2, 32:64] = 0.0
    return x


@pytest.mark.parametrize(("grid", "values", "bits"), [("e4m3", E4M3, 8), ("e2m1", E2M1, 4)])
def test_floats_round_to_the_nearest(grid: str, values: list[float], bits: int) -> None:
    """With a scale of 1 what comes out is on the grid, and nothing on the grid is nearer; beyond it, its end."""
    x = torch.cat([activations().flatten(), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 1e9, -1e9])])
    rounded = Rounding(grid, bits, scale=torch.ones(1)).apply(x.unsqueeze(0))[0]  # type: ignore[arg-type]
    for value, code in zip(x.tolist(), rounded.tolist(), strict=True):
        assert code in nearest(value, values)


def test_halves_go_to_the_even_code() -> None:
    """Rounding away from zero differs from hardware at every tie, and ties are common among few values."""
    halves = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]])
    assert Rounding("e2m1", 4, scale=torch.ones(1)).apply(halves).tolist() == [[0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]]
    assert Rounding("int", 8, scale=torch.ones(1)).apply(torch.tensor([[0.5, 1.5, 2.5]])).tolist() == [[0.0, 2.0, 2.0]]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_follow_each_token(bits: int, symmetric: bool) -> None:
    """The error is at most half a step of the token's own range, and a row of zeros stays zero."""
    x = torch.cat([activations(), torch.zeros(1, 96)])
    rounded = Rounding("int", bits, symmetric=symmetric).apply(x)
    low, high = x.amin(1).clamp_max(0), x.amax(1).clamp_min(0)
    span = 2 * torch.maximum(-low, high) if symmetric else high - low
    step = span / (2**bits - 1)
    # Symmetric codes end half a step below the largest value; an asymmetric zero is rounded, by half a step too.
    assert bool(((x - rounded).abs() <= (1.001 if not symmetric else 0.501) * step.unsqueeze(1)).all())
    assert not rounded[3].any()


def test_a_fixed_zero_point_lies_among_the_codes() -> None:
    """Bug: channels past the end of a row are given the nearest code there is, and count."""
    with pytest.raises(ValueError, match="the zero point of 4-bit activations is -8 to 7, not -77"):
        Rounding("int", 4, symmetric=False, scale=torch.tensor([0.5]), zero=torch.tensor([-77.0]))


def test_a_fixed_zero_point_moves_the_range() -> None:
    """Codes -128..127 with zero -128 reach from 0 to 255 steps: what is negative becomes 0."""
    rounding = Rounding("int", 8, symmetric=False, scale=torch.tensor([0.5]), zero=torch.tensor([-128.0]))
    assert rounding.apply(torch.tensor([[-3.0, 0.2, 100.3, 127.5, 300.0]])).tolist() == [
        [0.0, 0.0, 100.5, 127.5, 127.5]
    ]


def test_groups_have_scales_of_their_own() -> None:
    """One scale for a token would lose a small group beside a large one; the last group may be short."""
    x = torch.cat([torch.linspace(1, 2, 32), torch.linspace(1, 2, 32) / 1024, torch.linspace(1, 2, 8)]).unsqueeze(0)
    rounded = Rounding("e4m3", 8, 32).apply(x)
    assert bool(((x - rounded).abs() <= x / 16).all())
    assert torch.equal(rounded[:, 64:], Rounding("e4m3", 8).apply(x[:, 64:]))


@pytest.mark.parametrize(("grid", "bits", "highest", "largest"), [("e2m1", 4, 2, 6.0), ("e4m3", 8, 8, 448.0)])
def test_mx_scales_are_powers_of_two(grid: str, bits: int, highest: int, largest: float) -> None:
    """The peak's exponent, one more from 1.75 on, less that of the largest code."""
    for peak, exponent in [(1.0, 0), (1.74, 0), (1.76, 1), (2.0, 1), (0.3, -2)]:
        rounding = Rounding(grid, bits, 32, scale_grid="e8m0")  # type: ignore[arg-type]
        x = torch.linspace(0, peak, 32).unsqueeze(0)
        scale = 2.0 ** (exponent - highest)
        values = E2M1 if grid == "e2m1" else E4M3
        for value, rounded in zip(x[0].tolist(), rounding.apply(x)[0].tolist(), strict=True):
            assert rounded / scale in nearest(min(value / scale, largest), values)


def test_nvfp4_scales_are_multiples_of_the_unit() -> None:
    """A scale kept in float32 would round to other values than the hardware's e4m3 one."""
    unit = 1 / 720
    rounding = Rounding("e2m1", 4, 16, scale_grid="e4m3", scale_unit=torch.tensor([unit]))
    x = activations()[1:2, 16:32]  # [1, 16]
    (kept,) = nearest(float(x.abs().max()) / 6 / unit, E4M3)
    for value, rounded in zip(x[0].tolist(), rounding.apply(x)[0].tolist(), strict=True):
        near = [code * kept * unit for code in nearest(value / (kept * unit), E2M1)]
        assert any(abs(rounded - one) <= 1e-6 * abs(one) for one in near)


def test_a_token_does_not_see_its_neighbours() -> None:
    """A scale over the whole batch would make answers depend on who else asks."""
    x = activations()
    for rounding in (Rounding("int", 8), Rounding("int", 4, symmetric=False), Rounding("e4m3", 8, 32)):
        assert torch.equal(rounding.apply(x)[1:2], rounding.apply(x[1:2]))


def test_roundings_with_and_without_a_fixed_scale_are_not_the_same() -> None:
    """Layers that read the same input share it only where it is rounded alike."""
    fixed, other = (Rounding("e4m3", 8, scale=torch.tensor([value])) for value in (1.0, 2.0))
    assert same((fixed,), (Rounding("e4m3", 8, scale=torch.tensor([1.0])),))
    assert not same((fixed,), (other,))
    assert not same((fixed,), (Rounding("e4m3", 8),))
    assert not same((Rounding("e4m3", 8),), (fixed,))


def test_weights_beyond_their_bits_are_refused() -> None:
    """A 4-bit matrix stored in bytes may hold anything; packed into 4 bits it would be another one."""
    weight, scales = torch.full((2, 16), 9, dtype=torch.int8), torch.ones(2, 1)
    with pytest.raises(ValueError, match="reach from 9 to 9, beyond the range of 4 bits"):
        Int8Weights(4, 16, weight, scales, None, Rounding("int", 8))
    with pytest.raises(ValueError, match="rounded to integers, found e4m3"):
        Int8Weights(8, 16, weight, scales, None, Rounding("e4m3", 8))
