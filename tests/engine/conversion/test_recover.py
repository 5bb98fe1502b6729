"""Recovery: whatever grid weights were rounded to, they come back bit for bit, in the bits of that grid."""

import pytest
import torch
from torch import Tensor

from engine.conversion.distinct import find_distinct
from engine.conversion.encoder import ConversionRefused
from engine.conversion.forms import rounding_interval
from engine.conversion.recover import Recovery
from engine.conversion.schemes import read_scheme
from kernels.linear.affine.layout import AffineWeights
from kernels.linear.weights import LinearWeights

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def fake_quantized(scheme: str, dtype: torch.dtype, shape: tuple[int, int] = (48, 512)) -> Tensor:
    """What a paper's code saves: dequantized weights in the checkpoint's dtype."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(7)) * 0.02
    return read_scheme(scheme).encode(weight.to(dtype)).dequantize().to(dtype)


def recover(weight: Tensor) -> LinearWeights:
    """Recovered weights, checked bit for bit."""
    recovered = Recovery().encode(weight)
    assert torch.equal(recovered.dequantize().to(weight.dtype), weight)
    return recovered


def bits_of(recovered: LinearWeights, weight: Tensor) -> float:
    return recovered.num_bytes * 8 / weight.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("scheme", "what", "bits"),
    [
        ("rtn:b2:g64:clip", "2-bit g64", 2.25),
        ("rtn:b3:g128", "3-bit g128", 3.125),
        ("rtn:b4:g64", "4-bit g64", 4.25),
        ("rtn:b4:g128:asym", "4-bit g128", 4.1875),
        ("rtn:b4:g512", "4-bit g512", 4.03125),
        ("rtn:b3:g96:asym:clip", "3-bit g96", 3.28125),  # 512 channels: a short last group
        ("rtn:b5:g64", "5-bit g64", 5.25),
        ("rtn:b6:g128:asym", "6-bit g128", 6.1875),
        ("rtn:b7:g96", "7-bit g96", 7.1875),
        ("rtn:b8:g32", "8-bit g32", 8.5),  # the smallest of 32 weights is up to 20 steps from 0
        ("rtn:b8:g512", "8-bit g512", 8.03125),
        ("rtn:b8:g128:asym", "8-bit g128", 8.1875),
        ("mxint8", "8-bit g32", 8.5),
        ("mxfp4", "16-entry g32", None),
        ("nvfp4", "16-entry g16", None),
    ],
)
def test_known_grids_are_found_with_their_group_size(
    scheme: str, what: str, bits: float | None, dtype: torch.dtype
) -> None:
    """Bug: a larger group that happens to have 16 values, a table where an affine grid does, a scale off by one bit."""
    weight = fake_quantized(scheme, dtype)
    recovered = recover(weight)
    assert recovered.describe() == what
    if bits is not None:
        assert bits_of(recovered, weight) == bits


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_ternary_planes_are_found(dtype: torch.dtype) -> None:
    weight = fake_quantized("ptqtp", dtype)
    recovered = recover(weight)
    assert recovered.describe() == "3-entry g128 + 3-entry g128"
    assert bits_of(recovered, weight) == 4.25


def test_grids_without_a_scale_become_tables() -> None:
    """Binary values around a mean (BiLLM, W(1+1)): four values of no common step."""
    random = torch.Generator().manual_seed(8)
    values = torch.randn(16, 4, 4, generator=random).half()  # [rows, groups, values]
    codes = torch.randint(0, 4, (16, 4, 128), generator=random)
    weight = values.gather(-1, codes).view(16, 512)
    recovered = recover(weight)
    assert recovered.describe() == "4-value tables g128"
    assert bits_of(recovered, weight) == 2 + 4 * 16 / 128


def test_values_no_group_of_which_is_complete() -> None:
    """Bug: the step taken for the difference of neighbours, which is twice or three times the step where codes miss."""
    codes = torch.tensor([-7, -4, 2, 5]).repeat(4, 32)  # smallest magnitude is twice the step
    weight = (codes * 0.0123).half()
    (term,) = recover(weight).terms
    assert isinstance(term, AffineWeights)
    assert term.bits == 4


def test_signs_and_zeros() -> None:
    """Bug: -0 counted as a value of its own, a group of zeros without a scale, one value alone."""
    weight = torch.zeros(4, 64).half()
    weight[0, ::2] = -0.0
    weight[1] = 0.25
    weight[2] = torch.tensor([0.5, -0.5]).repeat(32)
    weight[3, 5] = -3.0
    recovered = recover(weight)
    assert bits_of(recovered, weight) <= 2.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_were_never_rounded_are_refused(dtype: torch.dtype) -> None:
    """Bug: every group of 16 channels has at most 16 values, so that anything could be "recovered", in 20 bits."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(9)).to(dtype)
    with pytest.raises(ConversionRefused, match=r"row \d has 32 different ones in a group of 32 channels.*--scheme"):
        Recovery().encode(weight)


def test_one_odd_weight_is_enough_to_refuse() -> None:
    """Bug: a sample of the rows that decides for all."""
    weight = fake_quantized("rtn:b4:g512", torch.float16, (64, 512))
    weight[37, :100] += torch.linspace(0, 0.01, 100).half()
    with pytest.raises(ConversionRefused, match="row 37"):
        Recovery().encode(weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_weight_between_two_steps_is_enough_to_refuse(dtype: torch.dtype) -> None:
    """Bug: a weight moved to the nearest step of 256, which no test of a whole model would notice."""
    weight = fake_quantized("rtn:b8:g512", dtype, (64, 512))
    step = float(weight[37].abs().max()) / 127
    column = int((weight[37] - 5 * step).abs().argmin())  # a value of few steps: its own rounding is far below one
    weight[37, column] += step / 2
    with pytest.raises(ConversionRefused, match="nor to a grid of 256 steps"):
        Recovery().encode(weight)


def test_grids_beside_groups_of_zeros_and_of_one_sign() -> None:
    """Bug: a scale of infinity for a group of zeros; positive weights whose multiples need all 8 bits and no sign."""
    codes = torch.randperm(256, generator=torch.Generator().manual_seed(10)).repeat(2, 1)
    codes[1] = 0
    weight = (codes * 0.0123).half()
    (term,) = recover(weight).terms
    assert isinstance(term, AffineWeights)
    assert term.bits == 8


def test_distinct_values_are_the_matrix() -> None:
    weight = fake_quantized("rtn:b3:g96", torch.float16)
    found = find_distinct(weight, 96)
    assert found is not None
    assert found.count == 7
    group = torch.arange(512) // 96
    assert torch.equal(found.values[torch.arange(48)[:, None], group, found.codes.long()], weight.float())
    assert find_distinct(weight, 512) is None


def test_rounding_intervals_are_those_of_the_dtype() -> None:
    """Bug: half the distance to the next number on both sides, though numbers lie denser below a power of two."""
    for dtype in DTYPES:
        magnitude = torch.tensor([1.0, 1.5, 0.1], dtype=dtype)
        low, high = rounding_interval(magnitude.float(), dtype)
        eps = torch.finfo(dtype).eps
        assert float(1 - low[0]) == eps / 4
        assert float(high[0] - 1) == eps / 2
        inside = torch.stack((low + (magnitude.double() - low) * 0.01, high - (high - magnitude.double()) * 0.01))
        if dtype != torch.float32:
            assert torch.equal(inside.to(dtype), magnitude.expand(2, 3))
