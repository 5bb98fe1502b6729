"""Whether a GPU stores keys and values as the reference does, for benchmarks.gpu_check: by `store`, by
`rotate_and_store`, which the engine calls, and to pages whose offsets do not fit 32 bits."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import PAGE_SIZE, Attended, random_cache
from benchmarks.gpu_errors import Checked, differing
from benchmarks.shapes import Shape
from kernels.attention.f16.gpu import F16Triton
from kernels.attention.f16.layout import page_shape
from kernels.attention.f16.reference import F16Reference
from kernels.attention.quantized.cache import QuantizedCache
from kernels.attention.quantized.gpu import QuantizedTriton
from kernels.attention.quantized.reference import QuantizedReference
from kernels.contract import AttentionInputs
from kernels.rope.reference import RopeReference

CPU = torch.device("cpu")


def check_stored(work: Attended, policy: str) -> Iterator[Checked]:
    """Bytes of packed pages, elements of others and turned queries that are not the reference's, to the last bit."""
    kernel, reference = (F16Triton(), F16Reference()) if policy == "f16" else (QuantizedTriton(), QuantizedReference())
    q, k, v, angles = rows_of(work)
    on_cpu = [x.cpu() for x in (q, k, v)]
    for rotates in (False, True):
        (ours, recent_each), (theirs, _) = empty_cache(work, policy), empty_cache(work, policy, CPU)
        step, host_step = (replace(work, device=device).step(recent_each).attention for device in (work.device, CPU))
        turned, keys, values = on_cpu
        found = q
        if rotates:
            found = kernel.rotate_and_store(q, k, v, angles, ours, step)
            turned, keys = RopeReference().rotate_pair(turned, keys, *(x.cpu() for x in angles))
        else:
            kernel.store(k, v, ours, step)
        reference.store(keys, values, theirs, host_step)
        pairs = [(found, turned), *zip(held(ours), held(theirs), strict=True)]
        name = "rotate and store" if rotates else "store"
        yield f"{name} {policy}", sum(differing(*pair) for pair in pairs)


def rows_of(work: Attended) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Queries, keys, values, and cosines and sines for each row."""
    num_rows, shape = work.num_seqs * work.num_rows, work.shape
    k, v = (4 * work.random(num_rows, shape.num_kv_heads, shape.head_dim) for _ in range(2))
    angles = 100 * torch.rand(num_rows, shape.head_dim // 2, device=work.device)
    return work.queries(), k, v, (angles.cos(), angles.sin())


def empty_cache(work: Attended, policy: str, device: torch.device | None = None) -> tuple[Any, int]:
    """What kernels take for a policy, of zeros, and the recent pages of a sequence."""
    work = replace(work, device=device or work.device)
    if policy == "f16":
        sizes = (work.num_seqs * work.pages_each, *page_shape(work.shape.num_kv_heads, PAGE_SIZE, work.shape.head_dim))
        return torch.zeros(sizes, dtype=torch.float16, device=work.device), 0
    cache, recent_each = random_cache(work, policy)
    pages, recent = torch.zeros_like(cache.pages), torch.zeros_like(cache.recent)
    return QuantizedCache(cache.codec, cache.layout, pages, recent), recent_each


def held(cache: Any) -> list[Tensor]:
    return [cache] if isinstance(cache, Tensor) else [cache.pages, cache.recent]


def check_far_pages(shape: Shape, num_rows: int, num_bytes: tuple[int, int], device: torch.device) -> Iterator[Checked]:
    """The same rows in the first page and in the last must leave the same bytes and give the same bits.

    num_bytes: of float16 pages, whose elements, and of packed ones, whose int32 words, must be more than 2^31.
    """
    work = Attended(shape, 1, num_rows, num_rows, device)
    page = page_shape(shape.num_kv_heads, PAGE_SIZE, shape.head_dim)
    sizes = (num_bytes[0] // (2 * math.prod(page)), *page)
    pages = torch.zeros(sizes, dtype=torch.float16, device=device)
    yield f"f16 pages of {pages.nbytes >> 30} GiB", far_error(work, F16Triton(), pages)
    del pages
    near, _ = random_cache(work, "skvq:k4v4:w0:s0")
    chunks = near.pages[:1].expand(num_bytes[1] // near.pages[0].numel(), -1, -1).contiguous()
    cache = QuantizedCache(near.codec, near.layout, chunks, near.recent)
    for kernel in (QuantizedTriton(), QuantizedTriton(fixed=True)):  # decode steps by tiles of 8 columns, and of 16
        yield f"{kernel.name}, packed pages of {chunks.nbytes >> 30} GiB", far_error(work, kernel, cache)


def far_error(work: Attended, kernel: F16Triton | QuantizedTriton, cache: Any) -> float:
    """A prompt, by wide tiles, and then its last row again as a decode step, turned and stored in one launch."""
    q, k, v, (cos, sin) = rows_of(work)
    pages, found = held(cache)[0], []
    for at in (0, len(pages) - 1):
        step = moved_to(work.step().attention, at)
        kernel.store(k, v, cache, step)
        prompt = kernel.attend(q, cache, step, 0.1)
        step = moved_to(replace(work, num_rows=1).step().attention, at)
        turned = kernel.rotate_and_store(q[-1:], k[-1:], v[-1:], (cos[-1:], sin[-1:]), cache, step)
        found.append(torch.cat((prompt, turned, kernel.attend(turned, cache, step, 0.1))))
    return differing(*found) + differing(pages[0], pages[-1])


def moved_to(inputs: AttentionInputs, page: int) -> AttentionInputs:
    """A step of one sequence on one page, on another page and without recent ones."""
    tables = torch.full_like(inputs.block_tables, page)
    return replace(inputs, block_tables=tables, slots=inputs.slots % PAGE_SIZE + page * PAGE_SIZE, recent=None)
