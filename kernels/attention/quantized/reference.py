"""The definition of attention over a quantized cache."""

import torch
from torch import Tensor

from kernels.attention.f16.layout import keys_of, values_of
from kernels.attention.quantized.cache import QuantizedCache, QuantizedSpec, page_views
from kernels.attention.quantized.codec import LIMIT
from kernels.attention.quantized.layout import RECENT_TOKENS
from kernels.contract import AttentionInputs

TILE_ROWS = 4  # query rows of a product; a decode step fills up three of them with zeros
MAX_KEYS = 4 << 20  # elements of keys that are spread over tiles at once: 16 MB of float32


class QuantizedReference:
    """out[h, i] = sum_{j <= i} softmax_j(scale * q[h, i] . k_ij[h / G]) v_ij[h / G],  in float32 for every dtype.

    k_ij, v_ij are key and value j as position i reads them: the high-precision rows iff j < S or i - j < W, else what
    the page decodes to (codec.py). G query heads share a kv head. Inputs saturate at +-65504.

    Every product has the shape (rows of a tile) x (one page) and pages are summed in order, the high-precision part of
    a page after its packed part, so that a row's result is the same to the last bit whatever else is in the batch and
    however its prompt was cut. Only bytes of positions below the context length are read.

    A sequence of n tokens reads n * token_bytes of its pages and the window for 4 * n * num_heads * D operations a
    query row; this one makes both products for every page.
    """

    name = "reference"

    def refuses(self, spec: QuantizedSpec) -> str | None:
        return None

    def store(self, k: Tensor, v: Tensor, cache: QuantizedCache, inputs: AttentionInputs) -> None:
        """QuantizedKernel.store."""
        keys = cache.codec.key_transform.apply(cache.codec.prepare_keys(_saturated(k)))  # [num_tokens, num_kv_heads, D]
        values = cache.codec.value_transform.apply(_saturated(v))
        page_size = cache.layout.page_size
        at = (inputs.slots // page_size, inputs.slots % page_size)
        key_views, value_views = page_views(cache.pages, cache.layout)
        key_views.write(at, *cache.codec.keys.encode(keys))
        value_views.write(at, *cache.codec.values.encode(values))
        if inputs.recent is not None:
            kept = inputs.recent.slots >= 0
            _store_recent(keys[kept], values[kept], cache.recent, inputs.recent.slots[kept])

    def attend(self, q: Tensor, cache: QuantizedCache, inputs: AttentionInputs, scale: float) -> Tensor:
        """QuantizedKernel.attend."""
        queries = cache.codec.key_transform.apply(cache.codec.prepare_queries(q.float()))  # [num_tokens, num_heads, D]
        result = torch.empty_like(queries)
        for i, (context_len, window) in enumerate(zip(inputs.context_lens, cache.windows(inputs), strict=True)):
            rows = slice(inputs.query_starts[i], inputs.query_starts[i + 1])
            first = context_len - (rows.stop - rows.start)  # position of the sequence's first row
            if first < context_len:
                packed = _unpack_pages(cache, inputs.block_tables[i], context_len)
                history = torch.stack((packed, _recent_pages(cache, inputs, i, (first, window), packed)))
                result[rows] = _attend_rows(queries[rows], history, (window, cache.codec.num_sinks), first, scale)
        return cache.codec.value_transform.invert(result).to(q.dtype)


def _saturated(x: Tensor) -> Tensor:
    """Before a transform, which would turn two infinities into a NaN."""
    return x.float().clamp(-LIMIT, LIMIT)


def _store_recent(keys: Tensor, values: Tensor, recent: Tensor, slots: Tensor) -> None:
    limit = torch.finfo(recent.dtype).max
    pages, rows = slots // RECENT_TOKENS, slots % RECENT_TOKENS
    keys_of(recent)[pages, :, :, rows] = keys.clamp(-limit, limit).to(recent.dtype)
    values_of(recent)[pages, :, rows] = values.clamp(-limit, limit).to(recent.dtype)


def _recent_pages(
    cache: QuantizedCache, inputs: AttentionInputs, i: int, reads: tuple[int, int], packed: Tensor
) -> Tensor:
    """What sequence i reads in high precision; 0 elsewhere, packed's shape. reads: position of its first row, W."""
    (first, window), context_len = reads, inputs.context_lens[i]
    page_size = cache.layout.page_size
    high = torch.zeros_like(packed).transpose(2, 3).flatten(1, 2)  # [keys | values, positions, num_kv_heads, D]
    at = torch.arange(context_len, device=packed.device)
    at = at[(at < cache.codec.num_sinks) | ((at > first - window) & (window > 0))]
    if len(at):
        if inputs.recent is None:
            raise ValueError(f"positions {at.tolist()} are read in high precision and the step has no recent pages")
        pages, rows = inputs.recent.tables[i][at // RECENT_TOKENS], at % RECENT_TOKENS
        if bool((pages < 0).any()):
            missing = at[pages < 0].tolist()
            raise ValueError(f"positions {missing} are read in high precision and have no recent page")
        high[0, at] = keys_of(cache.recent)[pages, :, :, rows].float()
        high[1, at] = values_of(cache.recent)[pages, :, rows].float()
    return high.view(2, packed.shape[1], page_size, *high.shape[2:]).transpose(2, 3)


def _unpack_pages(cache: QuantizedCache, block_table: Tensor, context_len: int) -> Tensor:
    """A sequence as its pages decode, 0 past its end: [keys | values, num_pages, num_kv_heads, page_size, D]."""
    page_size = cache.layout.page_size
    taken = cache.pages.index_select(0, block_table[: -(-context_len // page_size)])
    views = page_views(taken, cache.layout)
    decoded = []
    for codec, view in zip((cache.codec.keys, cache.codec.values), views, strict=True):
        rows, parameters = (part.transpose(1, 2) for part in view.read())  # heads beside channels, as the codec wants
        decoded.append(codec.decode(rows, parameters).transpose(1, 2))
    packed = torch.stack(decoded)
    packed[:, -1, :, (context_len - 1) % page_size + 1 :] = 0  # may be NaN, which a weight of zero would not hide
    return packed


def _attend_rows(q: Tensor, history: Tensor, high: tuple[int, int], first: int, scale: float) -> Tensor:
    """Some tiles at a time.

    q: [num_rows, num_heads, D] from position `first` on; history: [packed | high, keys | values, num_pages,
    num_kv_heads, page_size, D]; high: window and sinks.
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = history.shape[3]
    q = torch.nn.functional.pad(q, (0, 0, 0, 0, 0, -num_rows % TILE_ROWS))
    tiles = q.view(-1, TILE_ROWS, num_kv_heads, num_heads // num_kv_heads, head_dim)
    tiles = tiles.permute(0, 2, 3, 1, 4).flatten(2, 3)  # [num_tiles, num_kv_heads, G * TILE_ROWS, D]
    positions = torch.arange(first, first + len(q), device=q.device).view(-1, TILE_ROWS)
    at_once = max(1, MAX_KEYS // history[:, 0].numel())
    attended = [
        _attend_tiles(tiles[i : i + at_once], history, positions[i : i + at_once], high, scale)
        for i in range(0, len(tiles), at_once)
    ]
    rows = torch.cat(attended).view(len(tiles), num_kv_heads, -1, TILE_ROWS, head_dim)
    return rows.permute(0, 3, 1, 2, 4).reshape(-1, num_heads, head_dim)[:num_rows]


def _attend_tiles(q: Tensor, history: Tensor, positions: Tensor, high: tuple[int, int], scale: float) -> Tensor:
    """One product of one shape for every (tile, page, kv head, precision); then the pages are summed in order.

    q: [num_tiles, num_kv_heads, G * TILE_ROWS, D]; positions: [num_tiles, TILE_ROWS] -> q's shape. What a row does not
    see, or sees in the other precision, adds exact zeros to its sums.
    """
    (packed_keys, packed_values), (high_keys, high_values) = history
    num_pages, _, page_size = packed_keys.shape[:3]
    at = torch.arange(num_pages * page_size, device=q.device).view(num_pages, 1, page_size)
    distance = positions[:, None, :, None] - at  # [num_tiles, num_pages, TILE_ROWS, page_size]
    groups = q.shape[2] // positions.shape[1]
    hidden = (distance < 0).repeat(1, 1, groups, 1)[:, :, None]  # [num_tiles, num_pages, 1, G * TILE_ROWS, page_size]
    window, num_sinks = high
    is_high = ((at < num_sinks) | (distance < window)).repeat(1, 1, groups, 1)[:, :, None]
    scores = torch.where(is_high, q[:, None] @ high_keys.mT, q[:, None] @ packed_keys.mT) * scale
    scores.masked_fill_(hidden, -torch.inf)
    highest = scores.amax((1, 4), keepdim=True)  # [num_tiles, 1, num_kv_heads, G * TILE_ROWS, 1]
    weights = scores.sub_(highest).exp_()
    totals = weights.sum(-1, keepdim=True).cumsum(1)[:, -1]  # [num_tiles, num_kv_heads, G * TILE_ROWS, 1]
    summed: Tensor = weights.masked_fill(is_high, 0) @ packed_values
    summed = summed + weights.masked_fill(~is_high, 0) @ high_values
    return summed.cumsum(1)[:, -1] / totals
