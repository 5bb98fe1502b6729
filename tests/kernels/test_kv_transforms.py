"""Changes of a head's channels: orthogonal, undone exactly enough, and the same whatever else is in the batch."""

import pytest
import torch
from torch import Tensor

from kernels.attention.quantized.transforms import Chain, Hadamard, HeadTransform, Identity, Permutation, Rotation
from tests.tolerance import EPS, assert_within

HEADS, DIM = 2, 48


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orders() -> Tensor:
    return torch.stack([torch.randperm(DIM, generator=generator(seed)) for seed in range(HEADS)])


def matrices() -> Tensor:
    q: Tensor = torch.linalg.qr(torch.randn(HEADS, DIM, DIM, generator=generator(1)))[0]
    return q


TRANSFORMS: list[HeadTransform] = [
    Identity(),
    Hadamard(),
    Permutation(orders()),
    Rotation(matrices()),
    Chain((Permutation(orders()), Rotation(matrices()))),
]
every_transform = pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: type(transform).__name__)


@every_transform
def test_scores_are_kept_and_outputs_come_back(transform: HeadTransform) -> None:
    """Bugs: a query head that turns like another kv head; an inverse that is not one.

    A turned channel is a sum of at most DIM products, off by 4 EPS sqrt(DIM) of the head's norm; twice for a chain.
    """
    q, k = torch.randn(5, 3 * HEADS, DIM, generator=generator(2)), torch.randn(5, HEADS, DIM, generator=generator(3))
    turned_q, turned_k = transform.apply(q), transform.apply(k)
    norms = q.norm(dim=-1) * k.norm(dim=-1).repeat_interleave(3, 1)
    scores = (q.double() * k.double().repeat_interleave(3, 1)).sum(-1)
    turned = (turned_q.double() * turned_k.double().repeat_interleave(3, 1)).sum(-1)
    assert_within(turned, scores, 16 * EPS * DIM**0.5 * norms, "q.k")
    assert_within(transform.invert(turned_q), q, 16 * EPS * DIM**0.5 * q.norm(dim=-1, keepdim=True), "inverse")


@every_transform
def test_a_row_does_not_depend_on_the_others(transform: HeadTransform) -> None:
    """Bug: a product whose shape, and so whose order of sums, follows the batch."""
    x = torch.randn(13, 3 * HEADS, DIM, generator=generator(2))
    for change in (transform.apply, transform.invert):
        together = change(x)
        assert torch.equal(torch.cat([change(row[None]) for row in x]), together)
        assert torch.equal(torch.cat([change(x[:5]), change(x[5:])]), together)


@pytest.mark.parametrize("head_dim", [8, 48, 128])
def test_hadamard_is_sylvesters_matrix_in_blocks_of_a_power_of_two(head_dim: int) -> None:
    """The order of channels is part of the page's content: any other would not decode what an artifact was made for."""
    block = {8: 8, 48: 16, 128: 128}[head_dim]
    signs = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(block)] for i in range(block)])
    expected = torch.kron(torch.eye(head_dim // block), signs) * block**-0.5
    found = Hadamard().apply(torch.eye(head_dim)[:, None])[:, 0]
    assert_within(found, expected, 4 * EPS, "matrix")


def test_hadamard_spreads_an_outlier() -> None:
    x = torch.zeros(1, 1, 64)
    x[0, 0, 5] = 80.0
    assert float(Hadamard().apply(x).abs().max()) == 10.0


def test_a_permutation_gathers() -> None:
    """Bug: the inverse order taken for the order, which the inverse of the inverse hides."""
    x = torch.arange(3.0).expand(1, 2, 3)
    transform = Permutation(torch.tensor([[2, 0, 1]]))
    assert transform.apply(x)[0, 1].tolist() == [2, 0, 1]
