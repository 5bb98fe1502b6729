"""RoPE and the store of keys and values in one launch: a program is a head of a token, query heads first, then keys,
then values. What is stored is what kernels/gpu/rows.py, quantize.py and attention.py store one after the other; nothing
between is written to memory.

Callers compile with enable_fp_fusion off.
"""

import triton
import triton.language as tl

from kernels.gpu.attention import saturate
from kernels.gpu.quantize import butterflies, store_row


@triton.jit
def turned(x, cos, sin, token, head_at, HALF: tl.constexpr, D: tl.constexpr):
    """y[i] = x[i] cos[i] - x[i + HALF] sin[i],  y[i + HALF] = x[i + HALF] cos[i] + x[i] sin[i],  rounded to x's type:
    one head as float32 [D]."""
    d = tl.arange(0, D)
    inside, is_low = d < 2 * HALF, d < HALF
    angle = token * HALF + tl.where(is_low, d, d - HALF)
    here = tl.load(x + head_at + d, inside, other=0).to(tl.float32)
    there = tl.load(x + head_at + tl.where(is_low, d + HALF, d - HALF), inside, other=0).to(tl.float32)
    there = tl.where(is_low, -there, there)
    y = here * tl.load(cos + angle, inside, other=0) + there * tl.load(sin + angle, inside, other=0)
    return y.to(x.dtype.element_ty).to(tl.float32)


@triton.jit
def store_half(
    row, pages, slot, kv_head, num_kv_heads,
    IS_KEY: tl.constexpr, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """row [D] float32, saturated and rounded to float16, to its place in float16 pages; a slot below 0 is none."""
    d = tl.arange(0, D)
    if slot >= 0:
        to = (slot // PAGE * 2 * num_kv_heads + kv_head) * (PAGE * HEAD_DIM)
        if IS_KEY:
            at = to + d * PAGE + slot % PAGE
        else:
            at = to + num_kv_heads * (PAGE * HEAD_DIM) + slot % PAGE * HEAD_DIM + d
        tl.store(pages + at, saturate(row, LIMIT).to(tl.float16), d < HEAD_DIM)


@triton.jit
def plain(
    q, k, v, cos, sin, slots, q_out, pages, num_heads, num_kv_heads,
    PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Queries turned to q_out; keys turned, and values, to float16 pages.

    6 bytes and 3 operations an element, and the angles.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d, half = tl.arange(0, D), HEAD_DIM // 2
    if head < num_heads:
        at = (token * num_heads + head) * HEAD_DIM
        y = turned(q, cos, sin, token, at, half, D)
        tl.store(q_out + at + d, y.to(q_out.dtype.element_ty), d < HEAD_DIM)
    elif head < num_heads + num_kv_heads:
        kv_head = head - num_heads
        key = turned(k, cos, sin, token, (token * num_kv_heads + kv_head) * HEAD_DIM, half, D)
        store_half(key, pages, tl.load(slots + token), kv_head, num_kv_heads, True, PAGE, HEAD_DIM, D, LIMIT)
    else:
        kv_head = head - num_heads - num_kv_heads
        value = tl.load(v + (token * num_kv_heads + kv_head) * HEAD_DIM + d, d < HEAD_DIM, other=0).to(tl.float32)
        store_half(value, pages, tl.load(slots + token), kv_head, num_kv_heads, False, PAGE, HEAD_DIM, D, LIMIT)


@triton.jit
def packed(
    q, k, v, cos, sin, slots, recent_slots, q_out, chunks, halves, recent,
    key_clip, key_prescale, value_clip, value_prescale, num_heads, num_kv_heads, factor,
    D: tl.constexpr, LEVELS: tl.constexpr, PAGE: tl.constexpr, CHUNK: tl.constexpr, RECENT: tl.constexpr,
    LIMIT: tl.constexpr, TRIT_ROOM: tl.constexpr,
    K_BITS: tl.constexpr, K_GROUP: tl.constexpr, K_PARAMETERS: tl.constexpr, K_MAX_CODE: tl.constexpr,
    K_IS_ORIGIN: tl.constexpr, V_BITS: tl.constexpr, V_GROUP: tl.constexpr, V_CODES: tl.constexpr,
    V_PARAMETERS: tl.constexpr, V_MAX_CODE: tl.constexpr, V_IS_ORIGIN: tl.constexpr,
):  # fmt: skip
    """Queries turned to q_out; keys turned, and values, by a Hadamard transform, quantized to packed pages and, with
    RECENT tokens to a page, rounded to float16 pages; RECENT 0 has none.

    Of a kv head 4 D bytes in, t and 4 D out; 3 D operations to turn, D log2 D for the transform and about 12 D to
    quantize, keys and values each.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, D)
    if head < num_heads:
        at = (token * num_heads + head) * D
        y = turned(q, cos, sin, token, at, D // 2, D)
        tl.store(q_out + at + d, y.to(q_out.dtype.element_ty))
    elif head < num_heads + num_kv_heads:
        kv_head = head - num_heads
        key = turned(k, cos, sin, token, (token * num_kv_heads + kv_head) * D, D // 2, D)
        key = butterflies(saturate(key, LIMIT), D, LEVELS) * factor
        store_row(key, tl.load(slots + token), kv_head, chunks, halves, key_clip, key_prescale, num_kv_heads, True,
                  K_BITS, K_GROUP, PAGE, D, CHUNK, 0, K_PARAMETERS, K_MAX_CODE, K_IS_ORIGIN, TRIT_ROOM)  # fmt: skip
        if RECENT != 0:
            store_half(key, recent, tl.load(recent_slots + token), kv_head, num_kv_heads, True, RECENT, D, D, LIMIT)
    else:
        kv_head = head - num_heads - num_kv_heads
        value = tl.load(v + (token * num_kv_heads + kv_head) * D + d).to(tl.float32)
        value = butterflies(saturate(value, LIMIT), D, LEVELS) * factor
        store_row(value, tl.load(slots + token), kv_head, chunks, halves, value_clip, value_prescale, num_kv_heads,
                  False, V_BITS, V_GROUP, PAGE, D, CHUNK, V_CODES, V_PARAMETERS, V_MAX_CODE, V_IS_ORIGIN,
                  TRIT_ROOM)  # fmt: skip
        if RECENT != 0:
            store_half(value, recent, tl.load(recent_slots + token), kv_head, num_kv_heads, False, RECENT, D, D, LIMIT)
