"""What a page of the f16 codec holds.

    pages of a layer   [num_pages, 2, num_kv_heads, page_size, head_dim]     index 1: 0 keys (after RoPE), 1 values

Token t of a sequence lies in row t % page_size of page block_table[t // page_size]. A kv head's rows are contiguous,
so that a kernel streams one head's keys of a page in one run.
"""

import torch

CACHE_DTYPES = (torch.float16, torch.float32)


def page_shape(num_kv_heads: int, page_size: int, head_dim: int) -> tuple[int, int, int, int]:
    """The shape of one page of one layer; `page_size` in tokens."""
    return (2, num_kv_heads, page_size, head_dim)
