"""Integers packed into int32 words -> the canonical codes, zero points and input order of the affine family.

Words are little-endian, so the bytes of consecutive words are a little-endian stream of codes, which is the canonical
form: for most layouts no code is unpacked at all.
"""

import torch
from torch import Tensor

from engine.checkpoint.errors import TensorError
from kernels.linear.bitstream import pack_codes, unpack_codes

CODES_AT_ONCE = 1 << 18  # reorder_codes works on so many, one byte each, that they stay in the cache of a core


def num_words(num_codes: int, bits: int) -> int:
    """How many int32 words hold a stream of codes."""
    return -(-num_codes * bits // 32)


def words_to_stream(words: Tensor, bits: int, num_codes: int) -> Tensor:
    """Words [rows, num_words] int32, codes along the row -> [rows, ceil(num_codes * bits / 8)] uint8."""
    stream = words.contiguous().view(torch.uint8)  # [rows, 4 * num_words]
    return stream[:, : -(-num_codes * bits // 8)].contiguous()


def words_to_zeros(words: Tensor, bits: int, out_features: int) -> Tensor:
    """Zero points [groups, num_words] int32, packed along the outputs -> [out_features, groups] uint8."""
    stream = words_to_stream(words, bits, out_features)
    return unpack_codes(stream, bits, out_features).t().contiguous()


def input_order(g_idx: Tensor, group_size: int, name: str) -> Tensor | None:
    """The input channels sorted by group, [in_features] int64, or None when they already stand so.

    g_idx: [in_features], the group of each channel. Raises TensorError, naming the tensor, unless every group but the
    last is full.
    """
    groups = torch.arange(g_idx.shape[0], dtype=g_idx.dtype) // group_size  # [in_features], of a layer in order
    if torch.equal(g_idx, groups):
        return None
    order = torch.argsort(g_idx, stable=True)
    if not torch.equal(g_idx[order], groups):
        raise TensorError(f"tensor {name!r} does not put {group_size} input channels into every group but the last")
    return order


def reorder_codes(stream: Tensor, bits: int, order: Tensor) -> Tensor:
    """Column j of the result is column order[j].  stream: [rows, ceil(in_features * bits / 8)] uint8, likewise back."""
    rows_at_once = max(1, CODES_AT_ONCE // order.shape[0])
    return torch.cat(
        [
            pack_codes(unpack_codes(rows, bits, order.shape[0]).index_select(1, order), bits)
            for rows in torch.split(stream, rows_at_once)
        ]
    )
