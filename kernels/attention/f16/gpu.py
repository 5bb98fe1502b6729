"""Attention over pages of float16 on NVIDIA GPUs, in Triton (kernels/gpu/attention.py)."""

import math
from typing import Any

import torch
from torch import Tensor

from kernels.contract import AttentionInputs, AttentionSpec
from kernels.gpu import refusal
from kernels.gpu.checks import check_memory
from kernels.gpu.steps import Launch, Tiling, launches
from kernels.rope.checks import check_heads

PAGE_SIZES = (16, 32, 64, 128)  # tokens
MAX_HEAD_DIM = 256  # channels: the sums of a tile stay in registers
MAX_GROUP = 64  # query heads of a kv head
SPLIT = 256  # positions; of "triton-fixed", which has a part for each, more
FIXED_SPLIT = 512
BLOCK = 64  # tokens of a product; half as many of heads above 128 channels, which would spill registers
NUM_WARPS = 4  # twice as many for prompts with heads above 128 channels
MERGE_WARPS = 1
COMBINED, COMBINE_WARPS = 32, 4  # parts at once
STORE_WARPS = 1
NUM_STAGES = 1  # two take 47 registers more on sm_90, which would halve the programs of a multiprocessor


class F16Triton:
    """out[h, i] = sum_{j <= i} softmax_j(scale * q[h, i] . k[h / G, j]) v[h / G, j]

    Queries, divided by a power of two, and weights are rounded to float16; products are summed in float32. Of
    "triton-fixed" a row's result does not depend on the batch or on the chunks of its prompt (kernels/gpu/attention.py
    says why); "triton" serves prompts by wider tiles than decode steps, and cuts contexts by what else the step has.

    A sequence of n tokens reads 2 * n * num_kv_heads * head_dim elements of its pages, once for 16 / G query rows, or
    64 / G of prompts, for 4 * n * num_heads * head_dim operations a query row on tensor cores.
    """

    def __init__(self, split: int | None = None, block: int = BLOCK, fixed: bool = False) -> None:
        self._split, self._block, self._fixed = split or (FIXED_SPLIT if fixed else SPLIT), block, fixed
        self.name = "triton-fixed" if fixed else "triton"

    def refuses(self, spec: AttentionSpec) -> str | None:
        if (reason := refusal(spec.device, spec.dtype)) is not None:
            return reason
        if spec.cache_dtype != torch.float16:
            return f"pages of {spec.cache_dtype} are not float16"
        if spec.page_size not in PAGE_SIZES:
            return f"pages of {spec.page_size} tokens are not one of {PAGE_SIZES}"
        if spec.head_dim > MAX_HEAD_DIM:
            return f"head_dim {spec.head_dim} is above {MAX_HEAD_DIM}"
        if spec.num_heads // spec.num_kv_heads > MAX_GROUP:
            return f"{spec.num_heads} heads over {spec.num_kv_heads} are more than {MAX_GROUP} for each"
        return None

    def store(self, k: Tensor, v: Tensor, pages: Tensor, inputs: AttentionInputs) -> None:
        """k, v: [num_tokens, num_kv_heads, head_dim] go to `inputs.slots` of `pages`, which is mutated."""
        self._check_rows(k, v, pages, inputs)
        store_plain(k, v, pages, inputs.slots)

    def rotate_and_store(
        self, q: Tensor, k: Tensor, v: Tensor, angles: tuple[Tensor, Tensor], pages: Tensor, inputs: AttentionInputs
    ) -> Tensor:
        """RotatingKernel.rotate_and_store."""
        from kernels.gpu import rope_store

        self._check_rows(k, v, pages, inputs)
        check_float16("pages", pages)
        q, k, v, cos, sin = turnable(q, k, v, angles)
        turned = torch.empty_like(q)
        (num_tokens, num_heads, head_dim), num_kv_heads = q.shape, k.shape[1]
        if num_tokens:
            slots, fixed = inputs.slots.contiguous(), store_constants(head_dim, pages.shape[3])
            rope_store.plain[num_tokens, num_heads + 2 * num_kv_heads](
                *(q, k, v, cos, sin, slots, turned, pages, num_heads, num_kv_heads),
                **fixed,
                num_warps=STORE_WARPS,
                enable_fp_fusion=False,
            )
        return turned

    def _check_rows(self, k: Tensor, v: Tensor, pages: Tensor, inputs: AttentionInputs) -> None:
        expected = (inputs.query_starts[-1], pages.shape[2], pages.shape[4])
        if k.shape != expected or v.shape != expected:
            raise ValueError(f"keys {list(k.shape)} and values {list(v.shape)} must be rows of {list(expected)}")

    def attend(self, q: Tensor, pages: Tensor, inputs: AttentionInputs, scale: float) -> Tensor:
        """q: [num_tokens, num_heads, head_dim] -> the same shape and dtype."""
        from kernels.gpu import attention

        num_tokens, num_heads, head_dim = q.shape
        num_kv_heads, page_size = pages.shape[2:4]
        if num_tokens != inputs.query_starts[-1] or head_dim != pages.shape[4]:
            raise ValueError(
                f"queries {list(q.shape)} must be {inputs.query_starts[-1]} rows of {pages.shape[4]} channels"
            )
        check_float16("pages", pages)
        q, tables = q.contiguous(), inputs.block_tables.contiguous()
        result = torch.empty_like(q)
        tiling = Tiling(num_heads // num_kv_heads, self._split, num_kv_heads, self._fixed)
        for launch in launches(inputs, tiling, (0,) * len(inputs.context_lens), q.device):
            sums = q.new_empty(len(launch.rows), num_heads, launch.num_parts, head_dim, dtype=torch.float32)
            stats = q.new_empty(len(launch.rows), num_heads, launch.num_parts, 2, dtype=torch.float32)
            attention.attend[len(launch.tiles), num_kv_heads, launch.num_parts](
                q,
                pages,
                tables,
                launch.tiles,
                sums,
                stats,
                scale / math.log(2),
                num_heads,
                num_kv_heads,
                tables.shape[1],
                launch.num_parts,
                **constants(head_dim, page_size, tiling, self._block, launch.is_wide),
                num_warps=num_warps(head_dim, launch.is_wide),
                num_stages=NUM_STAGES,
            )
            merge(sums, stats, launch, result, self._fixed)
        return result


def num_warps(head_dim: int, is_wide: bool) -> int:
    return 2 * NUM_WARPS if is_wide and head_dim > 128 else NUM_WARPS


def constants(head_dim: int, page_size: int, tiling: Tiling, block: int, is_wide: bool) -> dict[str, int]:
    """What the attention kernel is compiled for."""
    return {
        "G": tiling.group,
        "PAGE": page_size,
        "HEAD_DIM": head_dim,
        "D": block_of(head_dim),
        "COLUMNS": tiling.columns(is_wide),
        "SPLIT": tiling.split,
        "BLOCK": block if head_dim <= 128 else block // 2,
        "WIDE": is_wide,
        "FOLD": tiling.fixed,
    }


def store_constants(head_dim: int, page_size: int) -> dict[str, Any]:
    """What the kernel that stores is compiled for."""
    return {"PAGE": page_size, "HEAD_DIM": head_dim, "D": block_of(head_dim), "LIMIT": torch.finfo(torch.float16).max}


def merge(sums: Tensor, stats: Tensor, launch: Launch, result: Tensor, fixed: bool) -> None:
    """The parts of each row of a launch into `result` [num_tokens, num_heads, head_dim], which is mutated."""
    from kernels.gpu import attention

    num_heads, head_dim = result.shape[1:]
    kernel: Any = attention.merge if fixed else attention.combine
    kernel[len(launch.rows), num_heads](
        sums,
        stats,
        launch.rows,
        result,
        launch.num_parts,
        HEAD_DIM=head_dim,
        D=block_of(head_dim),
        **({"num_warps": MERGE_WARPS} if fixed else {"PARTS": COMBINED, "num_warps": COMBINE_WARPS}),
    )


def turnable(q: Tensor, k: Tensor, v: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """q, k, v, cos and sin as kernels/gpu/rope_store.py takes them. Raises ValueError when they do not fit."""
    cos, sin = angles
    for x in (q, k):
        check_heads(x, cos, sin)
    for name, tensor, dtype in (
        ("queries", q, torch.bfloat16),
        ("keys", k, torch.bfloat16),
        ("angles", cos, torch.float32),
    ):
        check_memory(name, tensor, q, dtype)
    return tuple(tensor.contiguous() for tensor in (q, k, v, cos, sin))


def store_plain(k: Tensor, v: Tensor, pages: Tensor, slots: Tensor) -> None:
    """k, v: [num_tokens, num_kv_heads, head_dim]; slots: [num_tokens] int64, negative for rows that are not kept."""
    from kernels.gpu import attention

    check_float16("pages", pages)
    num_kv_heads, page_size, head_dim = pages.shape[2:]
    if not len(k):
        return
    attention.store[len(k), num_kv_heads](
        k.contiguous(),
        v.contiguous(),
        slots.contiguous(),
        pages,
        num_kv_heads,
        **store_constants(head_dim, page_size),
        num_warps=STORE_WARPS,
    )


def check_float16(name: str, pages: Tensor) -> None:
    """Raise ValueError, naming what was found, unless `pages` are contiguous float16."""
    if pages.dtype != torch.float16 or not pages.is_contiguous():
        raise ValueError(f"{name} must be contiguous float16, found {pages.dtype}")


def block_of(head_dim: int) -> int:
    """Channels of a tile: the next power of two, and no less than a product takes."""
    return max(16, 1 << (head_dim - 1).bit_length())
