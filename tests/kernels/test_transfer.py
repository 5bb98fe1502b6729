"""Tensors that travel together."""

import pytest
import torch

from kernels.transfer import Fetch, pack, refill, send

CPU = torch.device("cpu")
TENSORS = [
    torch.tensor([[1, -2], [3, 4]]),
    torch.tensor([0.5, -0.0, 7.0], dtype=torch.float32),
    torch.zeros(0, 6, dtype=torch.int32),
    torch.tensor([1e300], dtype=torch.float64),
]


def test_what_is_sent_arrives() -> None:
    """Bugs: tensors that overlap, or lie where their type may not; one that is empty; one that shares memory with what
    was sent, which the sender may change."""
    parcel = send(TENSORS, CPU)
    for found, expected in zip(parcel.tensors, TENSORS, strict=True):
        assert torch.equal(found, expected)
        assert found.dtype == expected.dtype
        assert found.data_ptr() != expected.data_ptr() or not expected.numel()
        assert found.data_ptr() % 16 == parcel.buffer.data_ptr() % 16 or not expected.numel()


def test_a_parcel_is_filled_again_in_place() -> None:
    """Bug: new tensors where a recorded step reads the old ones; a step of another shape, that shifts what follows."""
    parcel = pack(TENSORS, CPU)
    refill(parcel, [tensor + 1 for tensor in TENSORS])
    assert all(torch.equal(found, tensor + 1) for found, tensor in zip(parcel.tensors, TENSORS, strict=True))
    with pytest.raises(ValueError, match=r"\[4\] of torch.int64 cannot take the place of \[2, 2\] of torch.int64"):
        refill(parcel, [TENSORS[0].flatten(), *TENSORS[1:]])


def test_what_is_fetched_on_a_cpu_is_there() -> None:
    assert Fetch(TENSORS).wait() == TENSORS
