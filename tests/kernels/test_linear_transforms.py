"""Transforms around a layer's terms: what each does, and what a layer with them amounts to."""

import pytest
import torch
from torch import Tensor

from kernels.linear.dense.layout import DenseWeights
from kernels.linear.transforms import BlockRotation, Diagonal, Hadamard, Permutation, Transform, same
from kernels.linear.weights import LinearWeights
from tests.tolerance import EPS

WIDTH = 48
RANDOM = torch.Generator().manual_seed(3)
TRANSFORMS: dict[str, Transform] = {
    "permutation": Permutation(torch.randperm(WIDTH, generator=RANDOM)),
    "diagonal": Diagonal(torch.randn(WIDTH, generator=RANDOM).half()),
    "hadamard": Hadamard(16),
    "rotation": BlockRotation(torch.randn(1, 6, 6, generator=RANDOM)),
    "rotations": BlockRotation(torch.randn(3, 16, 16, generator=RANDOM)),
}


def matrix_of(transform: Transform) -> Tensor:
    """[WIDTH, WIDTH]: column j is what becomes of channel j."""
    return transform.apply(torch.eye(WIDTH)).T


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_transpose_is_the_transpose(name: str) -> None:
    """Bug: a permutation or a rotation undone in the wrong direction, which a symmetric example hides."""
    transform = TRANSFORMS[name]
    assert torch.equal(transform.apply_transposed(torch.eye(WIDTH)).T, matrix_of(transform).T)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_token_does_not_see_its_neighbours(name: str) -> None:
    """Bug: the last bits of an answer depend on who shares the step."""
    x = torch.randn(19, WIDTH, generator=torch.Generator().manual_seed(1))
    together = TRANSFORMS[name].apply(x)
    assert all(torch.equal(TRANSFORMS[name].apply(x[i : i + 1])[0], together[i]) for i in range(19))


def test_hadamard_is_sylvesters_matrix() -> None:
    block = torch.ones(1, 1)
    for _ in range(4):
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    assert torch.equal(matrix_of(Hadamard(16)), torch.kron(torch.eye(3), block) / 4)


def test_rotations_turn_their_own_run() -> None:
    matrices = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(2))
    expected = torch.zeros(WIDTH, WIDTH)
    for i in range(3):
        expected[16 * i : 16 * i + 16, 16 * i : 16 * i + 16] = matrices[i]
    assert torch.equal(matrix_of(BlockRotation(matrices)), expected)


def test_a_layer_dequantizes_to_what_it_computes() -> None:
    """Bug: pre transforms applied to the rows in the order of the input, post transforms to the columns."""
    random = torch.Generator().manual_seed(4)
    pre = tuple(TRANSFORMS[name] for name in ("rotation", "permutation", "hadamard", "diagonal"))
    post = (Hadamard(8), Diagonal(torch.randn(24, generator=random)), Permutation(torch.randperm(24, generator=random)))
    term = DenseWeights(torch.randn(24, WIDTH, generator=random))
    x = torch.randn(5, WIDTH, generator=random)
    y = x
    for transform in pre:
        y = transform.apply(y)
    y = y @ term.weight.T
    for transform in post:
        y = transform.apply(y)
    weight = LinearWeights((term,), pre, None, post).dequantize()
    # Seven maps one after the other, each of at most 48 terms: rounding grows with the norms of what it meets.
    bound = 4 * EPS * (len(pre) + len(post)) * WIDTH * float(x.norm() * term.weight.norm())
    assert float((x @ weight.T - y).abs().max()) < bound


def test_layers_share_an_input_only_when_their_transforms_are_equal() -> None:
    """Bug: keys computed from the queries' rotation of the input."""
    order = torch.arange(WIDTH)
    assert same((Permutation(order), Hadamard(16)), (Permutation(order.clone()), Hadamard(16)))
    assert not same((Permutation(order),), (Permutation(order.flip(0)),))
    assert not same((Hadamard(16),), (Hadamard(8),))
    assert not same((Hadamard(16),), ())


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="power of two, found 12"):
        Hadamard(12)
    with pytest.raises(ValueError, match="whole Hadamard blocks of 32"):
        Hadamard(32).apply(torch.zeros(1, WIDTH))
    with pytest.raises(ValueError, match="runs of a rotation"):
        TRANSFORMS["rotations"].apply(torch.zeros(1, 32))
    with pytest.raises(ValueError, match=r"expected \[runs, b, b\]"):
        BlockRotation(torch.zeros(3, 4, 5))
