"""The bound holds for correct kernels and catches small bugs: a bound that lets them pass is not a test."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.linear.affine.layout import AffineWeights
from kernels.linear.affine.reference import AffineReference
from tests.kernels.weights import random_affine
from tests.tolerance import assert_within, dot_bound

NUM_TOKENS, IN_FEATURES, OUT_FEATURES = 32, 1024, 24


def planted(weights: AffineWeights, bug: str) -> AffineWeights:
    """The weights a buggy kernel would act on."""
    if bug == "zero point off by one":
        zeros = weights.zeros.clone()
        zeros[5, 3] += 1
        return replace(weights, zeros=zeros)
    scales = weights.scales.clone()
    scales[5, 3] *= 1.0001
    return replace(weights, scales=scales)


def multiply(x: Tensor, weights: AffineWeights) -> Tensor:
    (y,) = AffineReference().linear(x, (weights,))
    return y


@pytest.mark.parametrize("bug", ["zero point off by one", "one group's scale off by 1.0001"])
def test_a_bug_in_one_group_of_one_row_is_caught(bug: str) -> None:
    weights = random_affine(4, IN_FEATURES, OUT_FEATURES, 64, torch.float32, seed=1)
    x = torch.randn(NUM_TOKENS, IN_FEATURES, generator=torch.Generator().manual_seed(2))
    matrix = weights.dequantize().double()
    expected, bound = x.double() @ matrix.T, dot_bound(x.double(), matrix)
    assert_within(multiply(x, weights), expected, bound)
    with pytest.raises(AssertionError, match=r"\[\d+, 5\]"):
        assert_within(multiply(x, planted(weights, bug)), expected, bound)


def test_the_last_two_columns_dropped_are_caught() -> None:
    weights = random_affine(4, IN_FEATURES, OUT_FEATURES, 64, torch.float32, seed=1)
    x = torch.randn(NUM_TOKENS, IN_FEATURES, generator=torch.Generator().manual_seed(2))
    matrix = weights.dequantize().double()
    dropped = x.clone()
    dropped[:, -2:] = 0
    with pytest.raises(AssertionError, match="exceeds the bound"):
        assert_within(multiply(dropped, weights), x.double() @ matrix.T, dot_bound(x.double(), matrix))


def test_nan_and_wrong_shapes_are_wrong() -> None:
    expected = torch.zeros(2, 3)
    with pytest.raises(AssertionError, match=r"\[1, 2\].*found nan"):
        assert_within(torch.tensor([[0.0, 0, 0], [0, 0, torch.nan]]), expected, 1.0)
    with pytest.raises(AssertionError, match=r"shape \[3, 2\]"):
        assert_within(torch.zeros(3, 2), expected, 1.0)


def test_the_message_says_where_what_and_the_bound() -> None:
    with pytest.raises(
        AssertionError, match=r"logits at \[1\]: expected 2, found 2.5, error 0.5 exceeds the bound 0.1"
    ):
        assert_within(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]), 0.1, "logits")
