"""The definition of store and attend over pages of floating point."""

import torch
from torch import Tensor

from kernels.attention.f16.layout import CACHE_DTYPES
from kernels.contract import AttentionInputs, AttentionSpec

MAX_SCORES = 4 << 20  # scores of one block of query rows, all heads: 16 MB of float32


class F16Reference:
    """out[h, i] = sum_{j <= i} softmax_j(scale * q[h, i] . k[h / G, j]) v[h / G, j],  in float32 for every dtype.

    G query heads share a kv head; i and j are positions in the sequence. Store rounds once to the pages' dtype and
    saturates: a value beyond float16 would become an infinity, and NaN for the rest of the sequence. Only rows below a
    sequence's context length are read, so whatever else lies in its pages (NaN included) cannot reach a result, nor
    can another sequence.

    A sequence of n tokens reads 2 * n * num_kv_heads * head_dim elements of its pages for 4 * n * num_heads *
    head_dim operations a query row.
    """

    name = "reference"

    def refuses(self, spec: AttentionSpec) -> str | None:
        if spec.cache_dtype not in CACHE_DTYPES:
            return f"pages of {spec.cache_dtype} are not one of {CACHE_DTYPES}"
        return None

    def store(self, k: Tensor, v: Tensor, pages: Tensor, inputs: AttentionInputs) -> None:
        """k, v: [num_tokens, num_kv_heads, head_dim] go to `inputs.slots` of `pages`, which is mutated."""
        page_size = pages.shape[3]
        page_ids, rows = inputs.slots // page_size, inputs.slots % page_size  # each [num_tokens]
        limit = torch.finfo(pages.dtype).max
        for index, values in enumerate((k, v)):
            pages[page_ids, index, :, rows] = values.clamp(-limit, limit).to(pages.dtype)

    def attend(self, q: Tensor, pages: Tensor, inputs: AttentionInputs, scale: float) -> Tensor:
        """q: [num_tokens, num_heads, head_dim] -> the same shape and dtype."""
        result = torch.empty_like(q)
        for i, context_len in enumerate(inputs.context_lens):
            start, stop = inputs.query_starts[i], inputs.query_starts[i + 1]
            if start < stop:
                keys, values = _gather(pages, inputs.block_tables[i], context_len)
                result[start:stop] = _attend_one(q[start:stop].float(), keys, values, scale)
        return result


def _gather(pages: Tensor, block_table: Tensor, context_len: int) -> tuple[Tensor, Tensor]:
    """The first `context_len` keys and values of a sequence, each [num_kv_heads, context_len, head_dim] float32."""
    num_pages = -(-context_len // pages.shape[3])
    taken = pages.index_select(0, block_table[:num_pages])  # [pages of the sequence, 2, num_kv_heads, page_size, D]
    both = taken.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :context_len].float()  # [2, num_kv_heads, context_len, D]
    return both[0], both[1]


def _attend_one(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """q: [num_rows, num_heads, D], the last rows of the sequence; keys, values: [num_kv_heads, n, D] -> q's shape."""
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads, context_len = keys.shape[:2]
    first = context_len - num_rows  # position of row 0
    block = max(1, MAX_SCORES // (num_heads * context_len))
    result = torch.empty_like(q)
    for start in range(0, num_rows, block):
        stop = min(start + block, num_rows)
        num_keys = first + stop  # no row of the block sees further
        grouped = q[start:stop].reshape(stop - start, num_kv_heads, -1, head_dim)  # [rows, num_kv_heads, G, D]
        rows = grouped.permute(1, 2, 0, 3)  # [num_kv_heads, G, rows, D]
        scores = rows @ keys[:, None, :num_keys].mT * scale  # [num_kv_heads, G, rows, num_keys]
        positions = torch.arange(first + start, num_keys, device=q.device)  # [rows]
        hidden = torch.arange(num_keys, device=q.device) > positions[:, None]  # [rows, num_keys]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        attended = weights @ values[:, None, :num_keys]  # [num_kv_heads, G, rows, D]
        result[start:stop] = attended.permute(2, 0, 1, 3).reshape(stop - start, num_heads, head_dim)
    return result
