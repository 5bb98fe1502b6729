"""Attention over pages of floating point in C++ (kernels/native/attention.hpp)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import native
from kernels.attention.f16.layout import CACHE_DTYPES
from kernels.contract import AttentionInputs, AttentionSpec
from kernels.native.checks import INT64, check_memory

if native.MISSING is None or TYPE_CHECKING:
    from kernels.native import _native

PAGE_SIZES = (16, 32, 64, 128)  # tokens


class F16Native:
    """out[h, i] = sum_{j <= i} softmax_j(scale * q[h, i] . k[h / G, j]) v[h / G, j],  in float32.

    G query heads share a kv head; its keys and values are read and widened once for all of them. A context is cut into
    splits of 512 tokens by position; each row's parts are merged in order, so that its result is the same to the last
    bit for any batch, any chunks of its prompt, any number of threads and any instruction set. Only rows below a
    sequence's context length can reach a result.

    A sequence of n tokens reads 2 * n * num_kv_heads * head_dim elements of its pages, once for up to 48 / G query
    rows, for 4 * n * num_heads * head_dim operations a query row.
    """

    name = "native"

    def refuses(self, spec: AttentionSpec) -> str | None:
        reason = native.refusal(spec.device, spec.dtype)
        if reason is not None:
            return reason
        if spec.cache_dtype not in CACHE_DTYPES:
            return f"pages of {spec.cache_dtype} are not one of {CACHE_DTYPES}"
        if spec.page_size not in PAGE_SIZES:
            return f"pages of {spec.page_size} tokens are not one of {PAGE_SIZES}"
        if spec.head_dim % 8:
            return f"head_dim {spec.head_dim} is not a multiple of 8"
        return None

    def store(self, k: Tensor, v: Tensor, pages: Tensor, inputs: AttentionInputs) -> None:
        """k, v: [num_tokens, num_kv_heads, head_dim] go to `inputs.slots` of `pages`, which is mutated."""
        expected = (inputs.query_starts[-1], pages.shape[2], pages.shape[4])
        if k.shape != expected or v.shape != expected:
            raise ValueError(f"keys {list(k.shape)} and values {list(v.shape)} must be rows of {list(expected)}")
        check_memory("keys", k)
        check_memory("values", v)
        k, v = k.contiguous(), v.contiguous()
        self.step(pages, inputs).store(k.data_ptr(), v.data_ptr(), pages.data_ptr())

    def attend(self, q: Tensor, pages: Tensor, inputs: AttentionInputs, scale: float) -> Tensor:
        """q: [num_tokens, num_heads, head_dim] float32 -> the same shape."""
        if q.shape[0] != inputs.query_starts[-1] or q.shape[2] != pages.shape[4]:
            raise ValueError(
                f"queries {list(q.shape)} must be {inputs.query_starts[-1]} rows of {pages.shape[4]} channels"
            )
        check_memory("queries", q)
        q = q.contiguous()
        result = torch.empty_like(q)
        self.step(pages, inputs).attend(q.data_ptr(), pages.data_ptr(), result.data_ptr(), q.shape[1], scale)
        return result

    def step(self, pages: Tensor, inputs: AttentionInputs) -> "_native.PagedAttention":
        """What the layers of one step share, made by the first. Raises ValueError for pages that do not exist."""
        check_memory("pages", pages, CACHE_DTYPES)
        if not pages.is_contiguous():
            raise ValueError("the pages of a layer must be contiguous")
        key = ("f16", pages.shape, pages.dtype)
        step: _native.PagedAttention | None = inputs.prepared.get(key)
        if step is None:
            step = inputs.prepared[key] = self.new_step(pages, inputs)
        return step

    def new_step(self, pages: Tensor, inputs: AttentionInputs) -> "_native.PagedAttention":
        """The same, shared with nobody."""
        check_memory("block_tables", inputs.block_tables, INT64)
        check_memory("slots", inputs.slots, INT64)
        num_pages, _, num_kv_heads, page_size, head_dim = pages.shape
        tables, slots = inputs.block_tables.contiguous(), inputs.slots.contiguous()
        return _native.PagedAttention(
            (num_pages, num_kv_heads, head_dim, page_size),
            pages.dtype == torch.float16,
            inputs.query_starts,
            inputs.context_lens,
            (tables.data_ptr(), tables.shape[0], tables.shape[1]),
            (slots.data_ptr(), slots.shape[0]),
        )
