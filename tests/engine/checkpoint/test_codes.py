"""Packed words, streams of codes, and the order of the inputs."""

import pytest
import torch

from engine.checkpoint import codes
from engine.checkpoint.errors import TensorError
from kernels.linear.bitstream import pack_codes, unpack_codes


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("num_codes", [1, 7, 8, 31, 33])
def test_pack_codes_writes_the_canonical_stream(bits: int, num_codes: int) -> None:
    """A stream whose last byte is cut or padded wrongly shifts or loses the last channels of every row."""
    values = (torch.arange(5 * num_codes) * 37 % (1 << bits)).to(torch.uint8).view(5, num_codes)
    packed = pack_codes(values, bits)
    assert packed.tolist() == [list(stream_of(row, bits)) for row in values.tolist()]
    assert torch.equal(unpack_codes(packed, bits, num_codes), values)


def stream_of(row: list[int], bits: int) -> bytes:
    """The definition: one long little-endian number, code k at bit k * bits."""
    number = sum(code << (k * bits) for k, code in enumerate(row))
    return number.to_bytes(-(-len(row) * bits // 8), "little")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_reorder_moves_columns_in_every_row(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are done a few at a time; the last, shorter lot must not be forgotten."""
    monkeypatch.setattr(codes, "CODES_AT_ONCE", 64)
    values = torch.randint(0, 1 << bits, (7, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    moved = codes.reorder_codes(pack_codes(values, bits), bits, order)
    assert torch.equal(unpack_codes(moved, bits, 24), values[:, order])


def test_order_keeps_channels_of_a_group_in_sequence() -> None:
    """An unstable sort would make the same checkpoint load differently from run to run."""
    g_idx = torch.tensor([1, 0, 1, 0, 2], dtype=torch.int32)
    order = codes.input_order(g_idx, 2, "g_idx")
    assert order is not None
    assert order.tolist() == [1, 3, 0, 2, 4]


@pytest.mark.parametrize("groups", [[0, 0, 0, 1], [0, 0, 2, 2], [1, 1, 2, 2], [-1, -1, 0, 0]])
def test_groups_that_are_not_full_are_refused(groups: list[int]) -> None:
    """Canonical groups are contiguous and equal: any other assignment would silently use a neighbour's scale."""
    with pytest.raises(TensorError, match=r"x\.g_idx"):
        codes.input_order(torch.tensor(groups, dtype=torch.int32), 2, "x.g_idx")
