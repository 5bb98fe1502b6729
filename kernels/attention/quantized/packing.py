"""Codes of a row to bytes and back; layout.py says which channel goes where.

pack    codes [..., D] uint8 -> bytes [..., row_bytes] uint8
unpack  the inverse
"""

import torch
from torch import Tensor

from kernels.attention.quantized.layout import TRITS_PER_BYTE, RowLayout, split_last

TRIT_STATES = 3**TRITS_PER_BYTE  # 243 of a byte's 256


def pack(codes: Tensor, layout: RowLayout) -> Tensor:
    """codes: [..., D] uint8, each at most layout.max_code -> [..., row_bytes] uint8."""
    if layout.bits == 1.5:
        return _pack_trits(codes, layout.row_bytes)
    if layout.bits == 3:
        return torch.cat((_pack_bits(codes & 3, 2), _pack_bits(codes >> 2, 1)), dim=-1)
    return _pack_bits(codes, int(layout.bits))


def unpack(rows: Tensor, layout: RowLayout) -> Tensor:
    """rows: [..., row_bytes] uint8 -> codes [..., D] uint8."""
    if layout.bits == 1.5:
        return _unpack_trits(rows)[..., : layout.head_dim]
    if layout.bits == 3:
        low, high = torch.split(rows, list(layout.planes), dim=-1)
        return _unpack_bits(low, 2) | (_unpack_bits(high, 1) << 2)
    return _unpack_bits(rows, int(layout.bits))


def _pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Byte j takes channels j, j + n, j + 2n, ... of n bytes, the first at bit 0."""
    parts = split_last(codes, 8 // bits, -1)  # [..., codes in a byte, n]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)[:, None]
    return (parts << shifts).sum(-2, dtype=torch.uint8)  # no two share a bit


def _unpack_bits(rows: Tensor, bits: int) -> Tensor:
    mask = (1 << bits) - 1
    return torch.cat([(rows >> shift) & mask for shift in range(0, 8, bits)], dim=-1)


def _pack_trits(codes: Tensor, num_bytes: int) -> Tensor:
    """byte = ceil(256 v / 243) with the first trit the most significant: 3 * byte carries it out at bit 8."""
    missing = num_bytes * TRITS_PER_BYTE - codes.shape[-1]
    trits = split_last(torch.nn.functional.pad(codes, (0, missing)), TRITS_PER_BYTE, num_bytes).to(torch.int32)
    value: Tensor = trits[..., 0, :]
    for i in range(1, TRITS_PER_BYTE):
        value = 3 * value + trits[..., i, :]
    packed: Tensor = (256 * value + TRIT_STATES - 1) // TRIT_STATES
    return packed.to(torch.uint8)


def _unpack_trits(rows: Tensor) -> Tensor:
    trits = []
    rest = rows.to(torch.int32)
    for _ in range(TRITS_PER_BYTE):
        rest = 3 * rest
        trits.append((rest >> 8).to(torch.uint8))
        rest = rest & 255
    return torch.cat(trits, dim=-1)
