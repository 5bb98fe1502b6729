"""Attention over the quantized cache in C++ (kernels/native/quantized.hpp)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import native
from kernels.attention.quantized.cache import QuantizedCache, QuantizedSpec
from kernels.attention.quantized.codec import LIMIT, RowCodec
from kernels.attention.quantized.layout import RowLayout
from kernels.attention.quantized.transforms import Hadamard, HeadTransform, Identity, Permutation
from kernels.contract import AttentionInputs
from kernels.native.checks import INT64, check_memory

if native.MISSING is None or TYPE_CHECKING:
    from kernels.native import _native

_Format = tuple[int, int, int, int, int, int, int]

MAX_HEAD_DIM = 512  # channels: sums of products of codes then fit 32 bits


class QuantizedNative:
    """out[h, i] = sum_{j <= i} softmax_j(scale * q[h, i] . k_ij[h / G]) v_ij[h / G],  in float32.

    k_ij, v_ij as in the reference. Products with codes are exact sums of integers: a query's channels are rounded to
    1 / levels of the largest of their group; and weights times scales, for what codes differ from the middle one, to
    1 / levels of the largest weight times the largest scale of 64 tokens. All else is float32. A row's result is the
    same to the last bit for any batch, any chunks of its prompt, any number of threads and any instruction set. Only
    rows below a sequence's context length can reach a result.

    A sequence of n tokens reads n * token_bytes of its pages, once for up to 48 / G query rows, and its window, for
    4 * n * num_heads * D operations a query row, twice as integers.
    """

    name = "native"

    def refuses(self, spec: QuantizedSpec) -> str | None:
        reason = native.refusal(spec.device, spec.dtype)
        if reason is not None:
            return reason
        head_dim = spec.layout.head_dim
        if head_dim % 16 or head_dim > MAX_HEAD_DIM:
            return f"head_dim {head_dim} is not a multiple of 16 up to {MAX_HEAD_DIM}"
        for what, row in (("keys", spec.layout.keys), ("values", spec.layout.values)):
            if row.num_groups and row.group_size % 16:
                return f"groups of {row.group_size} channels ({what}) are not a multiple of 16"
        return None

    def store(self, k: Tensor, v: Tensor, cache: QuantizedCache, inputs: AttentionInputs) -> None:
        """QuantizedKernel.store."""
        expected = (inputs.query_starts[-1], cache.num_kv_heads, cache.layout.head_dim)
        if k.shape != expected or v.shape != expected:
            raise ValueError(f"keys {list(k.shape)} and values {list(v.shape)} must be rows of {list(expected)}")
        check_memory("keys", k)
        check_memory("values", v)
        codec = cache.codec
        k = k if codec.key_shift is None else codec.prepare_keys(k.clamp(-LIMIT, LIMIT))
        k, v = _turned(k, codec.key_transform), _turned(v, codec.value_transform)
        layer = _layer(cache)
        self.step(cache, inputs).store(k.data_ptr(), v.data_ptr(), layer.memory)

    def attend(self, q: Tensor, cache: QuantizedCache, inputs: AttentionInputs, scale: float) -> Tensor:
        """QuantizedKernel.attend; q is float32."""
        if q.shape[0] != inputs.query_starts[-1] or q.shape[2] != cache.layout.head_dim:
            raise ValueError(
                f"queries {list(q.shape)} must be {inputs.query_starts[-1]} rows of {cache.layout.head_dim} channels"
            )
        check_memory("queries", q)
        codec = cache.codec
        q = codec.prepare_queries(q)
        q = q.contiguous() if _is_native(codec.key_transform) else codec.key_transform.apply(q).contiguous()
        result = torch.empty_like(q)
        layer = _layer(cache)
        self.step(cache, inputs).attend(q.data_ptr(), layer.memory, result.data_ptr(), q.shape[1], scale)
        return result if _is_native(codec.value_transform) else codec.value_transform.invert(result)

    def step(self, cache: QuantizedCache, inputs: AttentionInputs) -> "_native.QuantizedAttention":
        """What the layers of one step share: made by the first of a layout. Raises ValueError for pages that do not
        exist and for positions whose recent page is missing."""
        key = (_layer(cache).key, tuple(cache.windows(inputs)))
        step: _native.QuantizedAttention | None = inputs.prepared.get(key)
        if step is None:
            step = inputs.prepared[key] = self.new_step(cache, inputs)
        return step

    def new_step(self, cache: QuantizedCache, inputs: AttentionInputs) -> "_native.QuantizedAttention":
        """The same, shared with nobody."""
        check_memory("block_tables", inputs.block_tables, INT64)
        check_memory("slots", inputs.slots, INT64)
        tables, slots = inputs.block_tables.contiguous(), inputs.slots.contiguous()
        recent = (0, 0, 0)
        if inputs.recent is not None:
            check_memory("recent tables", inputs.recent.tables, INT64)
            check_memory("recent slots", inputs.recent.slots, INT64)
            recent_tables, recent_slots = inputs.recent.tables.contiguous(), inputs.recent.slots.contiguous()
            recent = (recent_tables.data_ptr(), recent_tables.shape[1], recent_slots.data_ptr())
        return _native.QuantizedAttention(
            (cache.pages.shape[0], cache.num_kv_heads, cache.layout.head_dim, cache.layout.page_size),
            _layer(cache).formats,
            (tuple(cache.windows(inputs)), cache.codec.num_sinks),
            (cache.recent.dtype == torch.float16, cache.recent.shape[0]),
            inputs.query_starts,
            inputs.context_lens,
            (tables.data_ptr(), *tables.shape),
            (slots.data_ptr(), slots.shape[0]),
            recent,
        )


def query_levels(bits: float) -> int:
    """Steps up to the largest channel that a query is rounded to: one int8 digit, two beside codes as fine as one. On
    normal data in groups of 64 one digit makes an error of 0.006 of a query's size, 4 bits one of 0.1 of a key's."""
    return 127 * 128 if bits == 8 else 127


def weight_levels(bits: float) -> int:
    """Steps that a weight times a scale is rounded to, which has no sign."""
    return 127 * 128 if bits == 8 else 255


def _is_native(transform: HeadTransform) -> bool:
    return isinstance(transform, Identity | Hadamard)


def _turned(x: Tensor, transform: HeadTransform) -> Tensor:
    """x before the transforms that C++ makes, after the others; infinities saturate before they are added up."""
    if _is_native(transform):
        return x.contiguous()
    return transform.apply(x if isinstance(transform, Permutation) else x.clamp(-LIMIT, LIMIT)).contiguous()


@dataclass(frozen=True)
class _Layer:
    """What all calls for one cache share: made by the first, or each would spend 3 us on it."""

    memory: "_native.QuantizedLayer"
    formats: tuple[_Format, _Format]
    key: tuple[object, ...]  # of the caches that share what is prepared for a step


def _layer(cache: QuantizedCache) -> _Layer:
    layer = cache.prepared.get("native")
    if not isinstance(layer, _Layer):
        layer = cache.prepared["native"] = _make_layer(cache)
    return layer


def _make_layer(cache: QuantizedCache) -> _Layer:
    if not (cache.pages.is_contiguous() and cache.recent.is_contiguous()):
        raise ValueError("the pages of a layer must be contiguous")
    codec, layout = cache.codec, cache.layout
    addresses = (cache.pages.data_ptr(), cache.recent.data_ptr())
    memory = _native.QuantizedLayer(addresses, _addresses(codec.keys), _addresses(codec.values))
    formats = (_format(layout.keys, codec.key_transform), _format(layout.values, codec.value_transform))
    key = ("quantized", cache.pages.shape, cache.recent.shape, cache.recent.dtype, formats, codec.num_sinks)
    return _Layer(memory, formats, key)


def _addresses(codec: RowCodec) -> tuple[int, int, bool]:
    for name, tensor in (("clip", codec.clip), ("prescale", codec.prescale)):
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous float32, not {tensor.dtype}")
    return codec.clip.data_ptr(), codec.prescale.data_ptr(), codec.mode == "origin"


def _format(row: RowLayout, transform: HeadTransform) -> _Format:
    width = 1 if row.bits == 1.5 else int(row.bits)
    turned = int(isinstance(transform, Hadamard))
    return width, row.group_size, row.row_bytes, row.planes[0], row.bytes_per_parameter, row.max_code, turned
