"""Attention over the quantized cache on NVIDIA GPUs, in Triton (kernels/gpu/quantized.py, kernels/gpu/quantize.py)."""

import math
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kernels.attention.f16.gpu import (
    BLOCK,
    FIXED_SPLIT,
    MAX_GROUP,
    MAX_HEAD_DIM,
    SPLIT,
    STORE_WARPS,
    check_float16,
    merge,
    num_warps,
    store_plain,
    turnable,
)
from kernels.attention.quantized.cache import QuantizedCache, QuantizedSpec
from kernels.attention.quantized.codec import LIMIT
from kernels.attention.quantized.layout import RECENT_TOKENS, TRITS_PER_BYTE, ChunkLayout
from kernels.attention.quantized.transforms import Hadamard, HeadTransform
from kernels.contract import AttentionInputs
from kernels.gpu import refusal
from kernels.gpu.steps import MIN_COLUMNS, WIDE_COLUMNS, Launch, Tiling, launches
from kernels.rope.gpu import RopeTriton

NUM_STAGES = 2  # of packed tokens: costs 8 registers and 8 KiB on sm_90; prompts have one, as two spill on sm_80
FEW_COLUMNS = 8  # of a tile that kernels/gpu/decode_steps.py serves
FEW_BITS = (2.0, 4.0)
FEW_WARPS = 1
# Groups of a head, above which its blocks have the fewest tokens that tensor cores take. 8 groups of 16 channels of
# `k4v4` take 38 instructions a token, 242 registers and 10.4 KiB on sm_90 then. Blocks of 64 tokens take 39, 255
# registers, 480 bytes of stack and 35.5 KiB.
FEW_GROUPS = 4
SMALL_BLOCK = 16


class QuantizedTriton:
    """out[h, i] = sum_{j <= i} softmax_j(scale * q[h, i] . k_ij[h / G]) v_ij[h / G]

    k_ij, v_ij as in the reference, rounded to float16 after unpacking, in units of the prescale. Queries, divided by a
    power of two, and weights are rounded to float16; products are summed in float32. Heads are turned before a step is
    stored or attended, and back after it: by a kernel of its own (Hadamard) or by torch. Tiles of "triton" and
    "triton-fixed" are those of float16 pages (F16Triton). A token whose recent page is missing makes the rows that read
    it NaN: asking for it on the host would make every step wait for the device.

    A sequence of n tokens reads n * token_bytes of its pages, once for 16 / G query rows, or 64 / G of prompts, and its
    window, for 4 * n * num_heads * D operations a query row on tensor cores.
    """

    def __init__(self, split: int | None = None, block: int = BLOCK, fixed: bool = False) -> None:
        self._split, self._block, self._fixed = split or (FIXED_SPLIT if fixed else SPLIT), block, fixed
        self.name = "triton-fixed" if fixed else "triton"

    def refuses(self, spec: QuantizedSpec) -> str | None:
        if (reason := refusal(spec.device, spec.dtype)) is not None:
            return reason
        head_dim = spec.layout.head_dim
        if head_dim & (head_dim - 1) or not 32 <= head_dim <= MAX_HEAD_DIM:
            return f"head_dim {head_dim} is not a power of two from 32 to {MAX_HEAD_DIM}"
        for what, row in (("keys", spec.layout.keys), ("values", spec.layout.values)):
            if row.group_size & (row.group_size - 1):
                return f"groups of {row.group_size} channels ({what}) are not a power of two"
        if spec.num_heads // spec.num_kv_heads > MAX_GROUP:
            return f"{spec.num_heads} heads over {spec.num_kv_heads} are more than {MAX_GROUP} for each"
        return None

    def store(self, k: Tensor, v: Tensor, cache: QuantizedCache, inputs: AttentionInputs) -> None:
        """QuantizedKernel.store."""
        self._check_rows(k, v, cache, inputs)
        if not len(k):
            return
        codec = cache.codec
        if codec.key_shift is None:
            keys = _turned(k, codec.key_transform, LIMIT)
        else:
            keys = _turned(codec.prepare_keys(k.float().clamp(-LIMIT, LIMIT)), codec.key_transform)
        values = _turned(v, codec.value_transform, LIMIT)
        slots = inputs.slots.contiguous()
        _store_packed(keys, slots, cache, is_key=True)
        _store_packed(values, slots, cache, is_key=False)
        if inputs.recent is not None:
            store_plain(keys, values, cache.recent, inputs.recent.slots)

    def rotate_and_store(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        angles: tuple[Tensor, Tensor],
        cache: QuantizedCache,
        inputs: AttentionInputs,
    ) -> Tensor:
        """RotatingKernel.rotate_and_store: one launch where both transforms are Hadamard's and keys are not shifted."""
        codec = cache.codec
        transforms = (codec.key_transform, codec.value_transform)
        if codec.key_shift is not None or not all(isinstance(one, Hadamard) for one in transforms):
            q, k = RopeTriton().rotate_pair(q, k, *angles)
            self.store(k, v, cache, inputs)
            return q
        self._check_rows(k, v, cache, inputs)
        q, k, v, cos, sin = turnable(q, k, v, angles)
        turned = torch.empty_like(q)
        if len(q):
            _rotate_and_store((q, k, v, cos, sin), turned, cache, inputs)
        return turned

    def _check_rows(self, k: Tensor, v: Tensor, cache: QuantizedCache, inputs: AttentionInputs) -> None:
        expected = (inputs.query_starts[-1], cache.num_kv_heads, cache.layout.head_dim)
        if k.shape != expected or v.shape != expected:
            raise ValueError(f"keys {list(k.shape)} and values {list(v.shape)} must be rows of {list(expected)}")

    def attend(self, q: Tensor, cache: QuantizedCache, inputs: AttentionInputs, scale: float) -> Tensor:
        """QuantizedKernel.attend. Raises ValueError when the read rule asks for recent pages and the step has none."""
        codec = cache.codec
        if q.shape[0] != inputs.query_starts[-1] or q.shape[2] != cache.layout.head_dim:
            raise ValueError(
                f"queries {list(q.shape)} must be {inputs.query_starts[-1]} rows of {cache.layout.head_dim} channels"
            )
        windows = tuple(cache.windows(inputs))
        if inputs.recent is None and (codec.num_sinks or any(windows)):
            raise ValueError(f"windows of {windows} and {codec.num_sinks} sinks are read; the step has no recent pages")
        queries = _turned(q if codec.key_shift is None else codec.prepare_queries(q.float()), codec.key_transform)
        result = torch.empty_like(queries)
        group = q.shape[1] // cache.num_kv_heads
        how = how_for(cache.layout, group, False, self._fixed)
        tiling = Tiling(group, self._split, cache.num_kv_heads, self._fixed, how.columns, how.residents)
        for launch in launches(inputs, tiling, windows, q.device):
            self._attend(queries, cache, inputs, (tiling, launch, scale / math.log(2)), result)
        return _turned_back(result, codec.value_transform, q.dtype)

    def _attend(
        self,
        q: Tensor,
        cache: QuantizedCache,
        inputs: AttentionInputs,
        what: tuple[Tiling, Launch, float],
        result: Tensor,
    ) -> None:
        tiling, launch, factor = what
        how = how_for(cache.layout, tiling.group, launch.is_wide, self._fixed)
        chunks, words, halves = _views(cache.pages)
        check_float16("recent pages", cache.recent)
        num_heads, head_dim = q.shape[1:]
        sums = q.new_empty(len(launch.rows), num_heads, launch.num_parts, head_dim)
        stats = q.new_empty(len(launch.rows), num_heads, launch.num_parts, 2)
        tables = inputs.block_tables.contiguous()
        recent_tables = tables if inputs.recent is None else inputs.recent.tables.contiguous()
        codec = cache.codec
        how.kernel()[len(launch.tiles), cache.num_kv_heads, launch.num_parts](
            q,
            *((words,) if how.module == "decode_steps" else (chunks, words, halves)),
            cache.recent,
            tables,
            recent_tables,
            launch.tiles,
            codec.keys.prescale,
            codec.values.prescale,
            sums,
            stats,
            factor,
            num_heads,
            cache.num_kv_heads,
            tables.shape[1],
            recent_tables.shape[1],
            codec.num_sinks,
            launch.num_parts,
            **constants(cache.layout, tiling, self._block, how),
            num_warps=how.num_warps,
            num_stages=how.num_stages,
        )
        merge(sums, stats, launch, result, self._fixed)


@dataclass(frozen=True)
class How:
    """Which kernel attends."""

    module: str  # under kernels.gpu
    is_wide: bool
    columns: int  # of a tile, at least
    num_warps: int
    num_stages: int
    residents: int = 2  # Tiling's
    block: int = BLOCK  # tokens of a product, at most

    def kernel(self) -> Any:
        return import_module(f"kernels.gpu.{self.module}").attend


def how_for(layout: ChunkLayout, group: int, is_wide: bool, is_fixed: bool) -> How:
    """For tiles of decode steps or (wide) of prompts, `group` query heads to a kv head."""
    rows = (layout.keys, layout.values)
    if is_wide:
        return How("quantized", True, WIDE_COLUMNS, num_warps(layout.head_dim, True), 1)
    if is_fixed or group > FEW_COLUMNS or any(row.bits not in FEW_BITS or row.group_size < 16 for row in rows):
        return How("quantized", False, MIN_COLUMNS, num_warps(layout.head_dim, False), NUM_STAGES)
    num_groups = max(row.num_groups for row in rows)
    residents = few_residents(layout.head_dim, num_groups)
    block = BLOCK if num_groups <= FEW_GROUPS else SMALL_BLOCK
    return How("decode_steps", False, FEW_COLUMNS, FEW_WARPS, NUM_STAGES, residents, block)


def few_residents(head_dim: int, num_groups: int) -> int:
    """Programs of kernels/gpu/decode_steps.py that a multiprocessor is given: Tiling.residents. num_groups: of a head.

    Those of 132 multiprocessors run at once on the 108 of an A100 too, which have 65,536 registers and 164 KiB each:
    nine programs of 224 registers, eight of 256 registers and 19.5 KiB, or seven of the 20.75 KiB of 16 groups; the
    driver takes 1 KiB more of each.
    """
    if head_dim <= 128 and num_groups <= 2:
        return 7
    return 6 if num_groups <= 8 else 5


def constants(layout: ChunkLayout, tiling: Tiling, block: int, how: How) -> dict[str, int]:
    """What the attention kernel is compiled for."""
    made = {} if how.module == "decode_steps" else {"WIDE": how.is_wide, "FOLD": tiling.fixed}
    return made | {
        "G": tiling.group,
        "PAGE": layout.page_size,
        "RECENT": RECENT_TOKENS,
        "D": layout.head_dim,
        "COLUMNS": tiling.columns(how.is_wide),
        "SPLIT": tiling.split,
        "BLOCK": min(how.block, block if layout.head_dim <= 128 else block // 2),
        "CHUNK": layout.chunk_bytes,
        "K_BITS": int(layout.keys.bits),  # 1 for 1.5
        "K_GROUP": layout.keys.group_size,
        "V_BITS": int(layout.values.bits),
        "V_GROUP": layout.values.group_size,
        "V_AT": layout.value_codes_at,
        "K_PARAMETERS": layout.key_parameters_at,
        "V_PARAMETERS": layout.value_parameters_at,
    }


def store_constants(layout: ChunkLayout, is_key: bool, is_origin: bool) -> dict[str, int]:
    """What the quantizer of keys, or of values, is compiled for."""
    row = layout.keys if is_key else layout.values
    return {
        "IS_KEY": is_key,
        "BITS": int(row.bits),
        "GROUP": row.group_size,
        "D": row.head_dim,
        "PAGE": layout.page_size,
        "CHUNK": layout.chunk_bytes,
        "CODES": 0 if is_key else layout.value_codes_at,
        "PARAMETERS": layout.key_parameters_at if is_key else layout.value_parameters_at,
        "MAX_CODE": row.max_code,
        "IS_ORIGIN": is_origin,
        "TRIT_ROOM": 1 << (-(-row.head_dim // TRITS_PER_BYTE) - 1).bit_length(),
    }


def turn_constants(head_dim: int, limit: float) -> dict[str, Any]:
    """What the Hadamard rotation is compiled for."""
    return {"D": head_dim, "LEVELS": head_dim.bit_length() - 1, "LIMIT": limit}


def rotating_constants(layout: ChunkLayout, modes: tuple[bool, bool], has_recent: bool) -> dict[str, Any]:
    """What kernels/gpu/rope_store.py is compiled for. modes: whether keys, and values, are cut towards the origin."""
    keys = store_constants(layout, True, modes[0])
    values = store_constants(layout, False, modes[1])
    names = ("BITS", "GROUP", "PARAMETERS", "MAX_CODE", "IS_ORIGIN")
    return (
        {f"K_{name}": keys[name] for name in names}
        | {f"V_{name}": values[name] for name in (*names, "CODES")}
        | {name: keys[name] for name in ("PAGE", "CHUNK", "TRIT_ROOM")}
        | turn_constants(layout.head_dim, LIMIT)
        | {"RECENT": RECENT_TOKENS if has_recent else 0}
    )


def _rotate_and_store(
    given: tuple[Tensor, ...], turned: Tensor, cache: QuantizedCache, inputs: AttentionInputs
) -> None:
    """given: q, k, v, cos, sin; mutates turned, like q."""
    from kernels.gpu import rope_store

    codec, slots, recent = cache.codec, inputs.slots.contiguous(), inputs.recent
    chunks, _, halves = _views(cache.pages)
    check_float16("recent pages", cache.recent)
    num_tokens, num_heads, head_dim = turned.shape
    rope_store.packed[num_tokens, num_heads + 2 * cache.num_kv_heads](
        *given,
        slots,
        slots if recent is None else recent.slots.contiguous(),
        turned,
        chunks,
        halves,
        cache.recent,
        codec.keys.clip.contiguous(),
        codec.keys.prescale,
        codec.values.clip.contiguous(),
        codec.values.prescale,
        num_heads,
        cache.num_kv_heads,
        1 / math.sqrt(head_dim),
        **rotating_constants(
            cache.layout, (codec.keys.mode == "origin", codec.values.mode == "origin"), recent is not None
        ),
        num_warps=STORE_WARPS,
        enable_fp_fusion=False,
    )


def _store_packed(x: Tensor, slots: Tensor, cache: QuantizedCache, is_key: bool) -> None:
    """x: [num_tokens, num_kv_heads, D] float32, contiguous."""
    from kernels.gpu import quantize

    codec = cache.codec.keys if is_key else cache.codec.values
    chunks, _, halves = _views(cache.pages)
    quantize.store[len(x), cache.num_kv_heads](
        x,
        slots,
        chunks,
        halves,
        codec.clip.contiguous(),
        codec.prescale,
        cache.num_kv_heads,
        **store_constants(cache.layout, is_key, codec.mode == "origin"),
        enable_fp_fusion=False,
        num_warps=STORE_WARPS,
    )


def _views(pages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same pages as bytes, int32 and float16. Raises ValueError when they are not contiguous."""
    if not pages.is_contiguous():
        raise ValueError("the pages of a layer must be contiguous")
    return pages, pages.view(torch.int32), pages.view(torch.float16)


def _turned(x: Tensor, transform: HeadTransform, limit: float = math.inf) -> Tensor:
    """transform.apply of x [num_tokens, heads, D], contiguous float32. x is saturated at +-limit first, as a transform
    would turn two infinities into a NaN."""
    if isinstance(transform, Hadamard):
        return _hadamard(x, limit, torch.float32)
    return transform.apply(x.float().clamp(-limit, limit)).contiguous()


def _turned_back(x: Tensor, transform: HeadTransform, dtype: torch.dtype) -> Tensor:
    """transform.invert of x [num_tokens, heads, D] float32."""
    return _hadamard(x, math.inf, dtype) if isinstance(transform, Hadamard) else transform.invert(x).to(dtype)


def _hadamard(x: Tensor, limit: float, dtype: torch.dtype) -> Tensor:
    """Hadamard, its own inverse, in one launch; torch makes several for each of log2(D) steps."""
    from kernels.gpu import quantize

    head_dim = x.shape[-1]
    x, result = x.contiguous(), torch.empty(x.shape, dtype=dtype, device=x.device)
    if len(x):
        quantize.hadamard[(x.numel() // head_dim,)](
            x,
            result,
            1 / math.sqrt(head_dim),
            **turn_constants(head_dim, limit),
            enable_fp_fusion=False,
            num_warps=STORE_WARPS,
        )
    return result
