"""An output head rounded to 8 bits."""

import pytest
import torch

from kernels import native
from kernels.linear.affine import quantize
from kernels.linear.affine.quantize import quantize_symmetric


@pytest.fixture(params=["native", "torch"], autouse=True)
def _rounds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a GPU's head is rounded on the CPU, where a machine without a compiler has no native library."""
    if request.param == "torch":
        monkeypatch.setattr(native, "MISSING", "the C++ kernels are not built")
    elif native.MISSING is not None:
        pytest.skip(native.MISSING)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "channels", "group"), [(1, 16, 16), (67, 96, 32), (130, 256, 128)])
def test_every_weight_is_within_half_a_step(dtype: torch.dtype, rows: int, channels: int, group: int) -> None:
    """Bug: a group rounded with its neighbour's scale, a code that wraps around at the largest weight."""
    weight = torch.randn(rows, channels, generator=torch.Generator().manual_seed(rows)).to(dtype)
    rounded = quantize_symmetric(weight, group)
    step = weight.float().view(rows, -1, group).abs().amax(-1, keepdim=True) / 127  # [rows, groups, 1]
    error = (rounded.dequantize() - weight.float()).view(rows, -1, group).abs()
    assert bool((error <= step * (0.5 + 2**-4)).all())
    assert rounded.num_bytes == rows * channels + 2 * rows * channels // group  # codes and float16 scales


def test_zeros_stay_zero_and_tiny_weights_keep_their_digits() -> None:
    """Bug: the scale of small weights rounded to a float16 with two digits, or 0 / 0 for a group of zeros."""
    weight = torch.zeros(2, 32)
    weight[1] = torch.linspace(-3e-7, 3e-7, 32)
    rounded = quantize_symmetric(weight, 16)
    assert rounded.scales.dtype == torch.float32
    assert torch.equal(rounded.dequantize()[0], torch.zeros(32))
    assert float((rounded.dequantize()[1] - weight[1]).abs().max()) <= 3e-7 / 127 * 0.51


def test_a_matrix_is_rounded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: a piece written over another, or memory that is given back once, at the end, when all of it is resident."""
    weight = torch.randn(10, 32, generator=torch.Generator().manual_seed(5))
    whole = quantize_symmetric(weight, 16)
    monkeypatch.setattr(quantize, "PIECE_WEIGHTS", 3 * 32 + 5)
    calls: list[int] = []
    pieces = quantize_symmetric(weight, 16, lambda: calls.append(1))
    assert torch.equal(pieces.codes, whole.codes)
    assert torch.equal(pieces.scales, whole.scales)
    assert len(calls) == 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(bad: float) -> None:
    weight = torch.ones(3, 64)
    weight[2, 40] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantize_symmetric(weight, 32)


@pytest.mark.parametrize(("channels", "group"), [(48, 32), (64, 24), (64, 8)])
def test_groups_that_do_not_fit_are_refused(channels: int, group: int) -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        quantize_symmetric(torch.ones(2, channels), group)
