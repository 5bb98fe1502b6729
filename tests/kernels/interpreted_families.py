"""The Triton kernels of int8, fp8, codebook, lookup and sparse weights against their references, under Triton's
interpreter: test_gpu_families.py runs this file in a process of its own. Shapes are tiny and odd."""

import importlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.gpu.tiles import cut
from kernels.linear.int8 import gpu as int8_gpu
from kernels.linear.int8.gpu import ByChannels, Int8Triton, Prepared
from kernels.linear.int8.layout import Int8Weights
from kernels.linear.rounding import Rounding
from tests.kernels.weights import random_int8
from tests.tolerance import EPS, assert_within

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
        assert operand.data.dtype == np.uint16
        return (operand.data.astype(np.uint32) << 16).view(np.float32)

    def dot(_: Any, a: Any, b: Any, d: Any, *__: Any) -> Any:
        return interpreter.TensorHandle(np.matmul(wide(a), wide(b)).astype(d.data.dtype) + d.data, d.dtype.scalar)

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
    """To the bit, from tiny to huge tokens; the interpreter misreads subnormal bfloat16. Bug: a reciprocal in place
    of a division, ties away from zero, a NaN that disappears, channels of padding that are counted."""
    width, run = 300, 128
    monkeypatch.setattr(int8_gpu, "ROUND_BLOCK", 256)  # two blocks
    x = activations(16, width) * torch.exp2(torch.linspace(-110, 120, 16)).bfloat16().unsqueeze(1)
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


@pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=list(ROUNDINGS))
def test_int8_groups_with_zero_points(rounding: Rounding) -> None:
    """Bug: a zero point counted for channels that are padding, twice in a split, or with its neighbour's scale."""
    for bits, group, num_tokens in ((4, 96, 3), (8, 32, 17), (3, 128, 66), (8, 300, 9)):
        check_int8(random_int8(bits, 300, N, group, rounding, seed=bits), num_tokens)


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
