"""What a page of the f16 codec holds.

    pages of a layer   [num_pages, 2, num_kv_heads, page_size, head_dim]     index 1: 0 keys (after RoPE), 1 values

Token t of a sequence lies in row t % page_size of page block_table[t // page_size]. What a page holds of one kv head
lies in one run, so that a kernel streams it. The values' run is token by token, as the shape says. The keys' run is
*channel by channel*, [head_dim, page_size]: vectors are then loaded along what is not summed over, tokens for the
scores and channels for the output, and no sum runs across the lanes of a vector. `keys_of` and `values_of` give both
as views.
"""

import torch
from torch import Tensor

CACHE_DTYPES = (torch.float16, torch.float32)


def page_shape(num_kv_heads: int, page_size: int, head_dim: int) -> tuple[int, int, int, int]:
    """The shape of one page of one layer; `page_size` in tokens."""
    return (2, num_kv_heads, page_size, head_dim)


def keys_of(pages: Tensor) -> Tensor:
    """[num_pages, 2, num_kv_heads, page_size, head_dim] -> its keys, [num_pages, num_kv_heads, head_dim, page_size]."""
    num_pages, _, num_kv_heads, page_size, head_dim = pages.shape
    return pages[:, 0].view(num_pages, num_kv_heads, head_dim, page_size)


def values_of(pages: Tensor) -> Tensor:
    """The values of the same pages, [num_pages, num_kv_heads, page_size, head_dim]."""
    return pages[:, 1]
