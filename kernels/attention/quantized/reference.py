"""The definition of attention over a quantized cache."""

import torch
from torch import Tensor

from kernels.attention.quantized.cache import QuantizedCache, QuantizedInputs, QuantizedSpec, page_views
from kernels.attention.quantized.codec import LIMIT

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

    def attend(
        self, rows: tuple[Tensor, Tensor, Tensor], cache: QuantizedCache, inputs: QuantizedInputs, scale: float
    ) -> Tensor:
        """QuantizedKernel.attend."""
        codec = cache.codec
        keys = codec.key_transform.apply(_saturated(rows[1]))  # [num_tokens, num_kv_heads, D]
        values = codec.value_transform.apply(_saturated(rows[2]))
        queries = codec.key_transform.apply(rows[0].float())  # [num_tokens, num_heads, D]
        _store_pages(keys, values, cache, inputs)
        limit = torch.finfo(cache.ring_keys.dtype).max
        recent = torch.stack((keys, values)).clamp(-limit, limit).to(cache.ring_keys.dtype)  # as the ring keeps them
        _store_sinks(recent, cache, inputs)
        result = torch.empty_like(queries)
        for i in range(len(inputs.context_lens)):
            rows_of_i = slice(inputs.query_starts[i], inputs.query_starts[i + 1])
            if rows_of_i.start < rows_of_i.stop:
                result[rows_of_i] = _attend_sequence(queries[rows_of_i], recent[:, rows_of_i], cache, inputs, i, scale)
        _store_rings(recent, cache, inputs)
        return codec.value_transform.invert(result).to(rows[0].dtype)


def _saturated(x: Tensor) -> Tensor:
    """Before a transform, which would turn two infinities into a NaN."""
    return x.float().clamp(-LIMIT, LIMIT)


def _store_pages(keys: Tensor, values: Tensor, cache: QuantizedCache, inputs: QuantizedInputs) -> None:
    page_size = cache.layout.page_size
    at = (inputs.slots // page_size, inputs.slots % page_size)
    key_views, value_views = page_views(cache.pages, cache.layout)
    key_views.write(at, *cache.codec.keys.encode(keys))
    value_views.write(at, *cache.codec.values.encode(values))


def _store_sinks(recent: Tensor, cache: QuantizedCache, inputs: QuantizedInputs) -> None:
    """recent: [keys | values, num_tokens, num_kv_heads, D]."""
    for i, context_len in enumerate(inputs.context_lens):
        row, stop = inputs.query_starts[i : i + 2]
        first = context_len - (stop - row)  # position of the sequence's first row
        count = min(stop - row, cache.codec.num_sinks - first)
        if count > 0:
            keys, values = recent[:, row : row + count]  # each [count, num_kv_heads, D]
            cache.sink_keys[inputs.sink_ids[i], :, :, first : first + count] = keys.permute(1, 2, 0)
            cache.sink_values[inputs.sink_ids[i], :, first : first + count] = values.transpose(0, 1)


def _store_rings(recent: Tensor, cache: QuantizedCache, inputs: QuantizedInputs) -> None:
    """The last rows of each sequence, as many as the ring has slots: earlier ones would be written over."""
    for i, context_len in enumerate(inputs.context_lens):
        start, stop = inputs.query_starts[i : i + 2]
        count = min(stop - start, cache.ring_slots)
        if count > 0:
            keys, values = recent[:, stop - count : stop]
            slots = torch.arange(context_len - count, context_len, device=recent.device) % cache.ring_slots
            cache.ring_keys[inputs.ring_ids[i], :, :, slots] = keys.permute(1, 2, 0)
            cache.ring_values[inputs.ring_ids[i], :, slots] = values.transpose(0, 1)


def _attend_sequence(
    q: Tensor, recent: Tensor, cache: QuantizedCache, inputs: QuantizedInputs, i: int, scale: float
) -> Tensor:
    """The rows of sequence i. q: [num_rows, num_heads, D]; recent: [keys | values, num_rows, num_kv_heads, D]."""
    context_len, num_rows = inputs.context_lens[i], q.shape[0]
    packed = _unpack_pages(cache, inputs.block_tables[i], context_len)
    first = context_len - num_rows
    high = torch.zeros_like(packed).transpose(2, 3).flatten(1, 2)  # [keys | values, positions, num_kv_heads, D]
    sinks = min(cache.codec.num_sinks, context_len)
    high[0, :sinks] = cache.sink_keys[inputs.sink_ids[i], :, :, :sinks].permute(2, 0, 1).float()
    high[1, :sinks] = cache.sink_values[inputs.sink_ids[i], :, :sinks].transpose(0, 1).float()
    before = torch.arange(min(first, max(sinks, first - cache.codec.window + 1)), first, device=q.device)
    if len(before):
        slots = before % cache.ring_slots
        high[0, before] = cache.ring_keys[inputs.ring_ids[i]][:, :, slots].permute(2, 0, 1).float()
        high[1, before] = cache.ring_values[inputs.ring_ids[i]][:, slots].transpose(0, 1).float()
    high[:, first:context_len] = recent.float()
    high = high.view(2, packed.shape[1], cache.layout.page_size, *high.shape[2:]).transpose(2, 3)
    return _attend_rows(q, torch.stack((packed, high)), cache, first, scale)


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


def _attend_rows(q: Tensor, history: Tensor, cache: QuantizedCache, first: int, scale: float) -> Tensor:
    """Some tiles at a time.

    q: [num_rows, num_heads, D] from position `first` on; history: [packed | high, keys | values, num_pages,
    num_kv_heads, page_size, D].
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = history.shape[3]
    q = torch.nn.functional.pad(q, (0, 0, 0, 0, 0, -num_rows % TILE_ROWS))
    tiles = q.view(-1, TILE_ROWS, num_kv_heads, num_heads // num_kv_heads, head_dim)
    tiles = tiles.permute(0, 2, 3, 1, 4).flatten(2, 3)  # [num_tiles, num_kv_heads, G * TILE_ROWS, D]
    positions = torch.arange(first, first + len(q), device=q.device).view(-1, TILE_ROWS)
    at_once = max(1, MAX_KEYS // history[:, 0].numel())
    attended = [
        _attend_tiles(tiles[i : i + at_once], history, positions[i : i + at_once], cache, scale)
        for i in range(0, len(tiles), at_once)
    ]
    rows = torch.cat(attended).view(len(tiles), num_kv_heads, -1, TILE_ROWS, head_dim)
    return rows.permute(0, 3, 1, 2, 4).reshape(-1, num_heads, head_dim)[:num_rows]


def _attend_tiles(q: Tensor, history: Tensor, positions: Tensor, cache: QuantizedCache, scale: float) -> Tensor:
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
    is_high = ((at < cache.codec.num_sinks) | (distance < cache.codec.window)).repeat(1, 1, groups, 1)[:, :, None]
    scores = torch.where(is_high, q[:, None] @ high_keys.mT, q[:, None] @ packed_keys.mT) * scale
    scores.masked_fill_(hidden, -torch.inf)
    highest = scores.amax((1, 4), keepdim=True)  # [num_tiles, 1, num_kv_heads, G * TILE_ROWS, 1]
    weights = scores.sub_(highest).exp_()
    totals = weights.sum(-1, keepdim=True).cumsum(1)[:, -1]  # [num_tiles, num_kv_heads, G * TILE_ROWS, 1]
    summed: Tensor = weights.masked_fill(is_high, 0) @ packed_values
    summed = summed + weights.masked_fill(~is_high, 0) @ high_values
    return summed.cumsum(1)[:, -1] / totals
