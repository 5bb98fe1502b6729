"""The definition of store and attend over pages of floating point."""

import torch
from torch import Tensor

from kernels.attention.f16.layout import CACHE_DTYPES, keys_of, values_of
from kernels.contract import AttentionInputs, AttentionSpec

TILE_ROWS = 4  # query rows of a product; a decode step fills up three of them with zeros
MAX_KEYS = 4 << 20  # elements of keys that are spread over tiles at once: 16 MB of float32


class F16Reference:
    """out[h, i] = sum_{j <= i} softmax_j(scale * q[h, i] . k[h / G, j]) v[h / G, j],  in float32 for every dtype.

    G query heads share a kv head; i and j are positions in the sequence. Store rounds once to the pages' dtype and
    saturates: a value beyond float16 would become an infinity, and NaN for the rest of the sequence. Only rows below a
    sequence's context length are read, so whatever else lies in its pages (NaN included) cannot reach a result, nor
    can another sequence.

    Every product has the shape (rows of a tile) x (one page) and pages are summed in order, so that a row's result is
    the same to the last bit whatever else is in the batch and however its prompt was cut.

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
        # As float32: no limit but that of bfloat16 is a bfloat16.
        keys_of(pages)[page_ids, :, :, rows] = k.float().clamp(-limit, limit).to(pages.dtype)
        values_of(pages)[page_ids, :, rows] = v.float().clamp(-limit, limit).to(pages.dtype)

    def attend(self, q: Tensor, pages: Tensor, inputs: AttentionInputs, scale: float) -> Tensor:
        """q: [num_tokens, num_heads, head_dim] -> the same shape and dtype."""
        result = torch.empty_like(q)
        for i, context_len in enumerate(inputs.context_lens):
            start, stop = inputs.query_starts[i], inputs.query_starts[i + 1]
            if start < stop:
                keys, values = _gather(pages, inputs.block_tables[i], context_len)
                positions = torch.arange(context_len - (stop - start), context_len, device=q.device)
                result[start:stop] = _attend_one(q[start:stop].float(), keys, values, positions, scale)
        return result


def _gather(pages: Tensor, block_table: Tensor, context_len: int) -> tuple[Tensor, Tensor]:
    """A sequence by pages, in float32, zero beyond its end.

    Returns keys [num_pages, num_kv_heads, D, page_size] and values [num_pages, num_kv_heads, page_size, D].
    """
    page_size = pages.shape[3]
    num_pages, used = -(-context_len // page_size), (context_len - 1) % page_size + 1
    taken = pages.index_select(0, block_table[:num_pages]).float()  # [num_pages, 2, num_kv_heads, page_size, D]
    keys, values = keys_of(taken), values_of(taken)
    keys[-1, :, :, used:] = 0
    values[-1, :, used:] = 0  # may be NaN, which a weight of zero would not hide
    return keys, values


def _attend_one(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    """The rows of one sequence, some tiles at a time.

    q: [num_rows, num_heads, D]; keys, values: as _gather returns them; positions: [num_rows].
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = keys.shape[1]
    missing = -num_rows % TILE_ROWS
    q = torch.nn.functional.pad(q, (0, 0, 0, 0, 0, missing))
    positions = torch.nn.functional.pad(positions, (0, missing))
    tiles = q.view(-1, TILE_ROWS, num_kv_heads, num_heads // num_kv_heads, head_dim)
    tiles = tiles.permute(0, 2, 3, 1, 4).flatten(2, 3)  # [num_tiles, num_kv_heads, G * TILE_ROWS, D]
    at_once = max(1, MAX_KEYS // keys.numel())
    at = positions.view(-1, TILE_ROWS)
    attended = [
        _attend_tiles(tiles[i : i + at_once], keys, values, at[i : i + at_once], scale)
        for i in range(0, len(tiles), at_once)
    ]
    rows = torch.cat(attended).view(len(tiles), num_kv_heads, -1, TILE_ROWS, head_dim)
    return rows.permute(0, 3, 1, 2, 4).reshape(-1, num_heads, head_dim)[:num_rows]


def _attend_tiles(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    """One product of one shape for every (tile, page, kv head); then the pages are summed in order.

    q: [num_tiles, num_kv_heads, G * TILE_ROWS, D]; positions: [num_tiles, TILE_ROWS] -> q's shape. A page that a row
    does not see adds exact zeros at the end of its sums.
    """
    num_pages, page_size = keys.shape[0], keys.shape[3]
    scores = (q[:, None] @ keys) * scale  # [num_tiles, num_pages, num_kv_heads, G * TILE_ROWS, page_size]
    at = torch.arange(num_pages * page_size, device=q.device).view(num_pages, 1, page_size)
    hidden = at > positions[:, None, :, None]  # [num_tiles, num_pages, TILE_ROWS, page_size]
    groups = q.shape[2] // positions.shape[1]
    scores.masked_fill_(hidden.repeat(1, 1, groups, 1)[:, :, None], -torch.inf)
    highest = scores.amax((1, 4), keepdim=True)  # [num_tiles, 1, num_kv_heads, G * TILE_ROWS, 1]
    weights = scores.sub_(highest).exp_()
    totals = weights.sum(-1, keepdim=True).cumsum(1)[:, -1]  # [num_tiles, num_kv_heads, G * TILE_ROWS, 1]
    return (weights @ values).cumsum(1)[:, -1] / totals
