"""The quantizer of the cache in Triton, and the rotation before it: the bytes of kernels/attention/quantized/codec.py.

Each operation is a float32 one, rounded by itself: divisions are exact, and callers compile with enable_fp_fusion off.
"""

import triton
import triton.language as tl

from kernels.gpu.attention import saturate
from kernels.gpu.quantized import e4m3


@triton.jit
def hadamard(x, out, factor, D: tl.constexpr, LEVELS: tl.constexpr, LIMIT: tl.constexpr):
    """Hadamard.apply (kernels/attention/quantized/transforms.py) on one row of D = 2^LEVELS channels, saturated
    before: the same additions in the same order. factor is D^-1/2.

    D log2(D) additions; the input's bytes and the output's.
    """
    row, d = tl.program_id(0).to(tl.int64) * D, tl.arange(0, D)
    y = butterflies(saturate(tl.load(x + row + d).to(tl.float32), LIMIT), D, LEVELS) * factor
    tl.store(out + row + d, y.to(out.dtype.element_ty))


@triton.jit
def butterflies(y, D: tl.constexpr, LEVELS: tl.constexpr):
    """The additions of a Hadamard transform of y [D], D = 2^LEVELS."""
    for i in tl.static_range(LEVELS):
        low, high = tl.split(tl.permute(tl.reshape(y, (D >> (i + 1), 2, 1 << i)), (0, 2, 1)))
        y = tl.reshape(tl.permute(tl.join(low + high, low - high), (0, 2, 1)), (D,))
    return y


@triton.jit
def to_e4m3(x):
    """float32 -> the code of the nearest e4m3, int32; saturates, half to even, zero without a sign, NaN as 127."""
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = ((size * 512.0 + 8388608.0) - 8388608.0).to(tl.int32)  # below 2^-6: steps of 2^-9
    code = tl.where(size < 0.015625, small, normal)
    code = tl.where((x < 0) & (code > 0), code | 0x80, code)
    return tl.where(x != x, 0x7F, code)


@triton.jit
def to_float16(x):
    """float32 -> float16 as codec.encode_parameter rounds, as int16."""
    half = saturate(x, 65504.0).to(tl.float16)
    bits = tl.where(half == 0.0, 0, half.to(tl.int16, bitcast=True))
    return tl.where(x != x, 0x7E00, bits).to(tl.int16)


@triton.jit
def pack_plane(codes, BITS: tl.constexpr, D: tl.constexpr):
    """codes [D] int32 -> the bytes of a plane [D BITS / 8] int32, channel j + i n at bit i BITS of byte j."""
    parts = tl.reshape(codes, (8 // BITS, D * BITS // 8))
    return tl.sum(parts << (tl.arange(0, 8 // BITS) * BITS)[:, None], 0)


@triton.jit
def store_plane(target, bytes_, t, IS_KEY: tl.constexpr, PAGE: tl.constexpr, UNIT: tl.constexpr, ROW: tl.constexpr,
                BYTES: tl.constexpr, ROOM: tl.constexpr):  # fmt: skip
    """The BYTES first of bytes_ [ROOM] to row t of a plane: token by token, or unit by unit (keys)."""
    j = tl.arange(0, ROOM)
    if IS_KEY:
        to = (j // UNIT * PAGE + t) * UNIT + j % UNIT
    else:
        to = t * ROW + j
    tl.store(target + to, bytes_.to(tl.uint8), j < BYTES)


@triton.jit
def store_codes(
    chunk, codes, t, IS_KEY: tl.constexpr, BITS: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
    TRIT_ROOM: tl.constexpr,
):  # fmt: skip
    """codes [D] int32 of token t, packed; BITS is 1 for 1.5. TRIT_ROOM: a power of two, at least ceil(D / 5)."""
    if BITS == 1:
        n: tl.constexpr = (D + 4) // 5
        d = tl.arange(0, D)
        digit = d // n
        power = tl.where(digit == 0, 81, tl.where(digit == 1, 27, tl.where(digit == 2, 9, tl.where(digit == 3, 3, 1))))
        here = (d % n)[None, :] == tl.arange(0, TRIT_ROOM)[:, None]
        value = tl.sum(tl.where(here, (codes * power)[None, :], 0), 1)
        store_plane(chunk, (256 * value + 242) // 243, t, IS_KEY, PAGE, 1, n, n, TRIT_ROOM)
    elif BITS == 3:
        store_plane(chunk, pack_plane(codes & 3, 2, D), t, IS_KEY, PAGE, 4, 3 * D // 8, D // 4, D // 4)
        if IS_KEY:
            chunk += PAGE * (D // 4)
        else:
            chunk += D // 4
        store_plane(chunk, pack_plane(codes >> 2, 1, D), t, IS_KEY, PAGE, 4, 3 * D // 8, D // 8, D // 8)
    else:
        size: tl.constexpr = D * BITS // 8
        store_plane(chunk, pack_plane(codes, BITS, D), t, IS_KEY, PAGE, 4, size, size, size)


@triton.jit
def store(
    x, slots, chunks, halves, clip, prescale, num_kv_heads,
    IS_KEY: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
    CHUNK: tl.constexpr, CODES: tl.constexpr, PARAMETERS: tl.constexpr, MAX_CODE: tl.constexpr,
    IS_ORIGIN: tl.constexpr, TRIT_ROOM: tl.constexpr,
):  # fmt: skip
    """Keys or values of one token and kv head, transformed already, quantized to their place in a page.

    The formula is that of kernels/attention/quantized/codec.py. 4 D bytes in, row and parameters out; about 12 D
    operations.
    """
    token, kv_head = tl.program_id(0), tl.program_id(1)
    row = tl.load(x + (token.to(tl.int64) * num_kv_heads + kv_head) * D + tl.arange(0, D))
    store_row(row, tl.load(slots + token), kv_head, chunks, halves, clip, prescale, num_kv_heads, IS_KEY, BITS, GROUP,
              PAGE, D, CHUNK, CODES, PARAMETERS, MAX_CODE, IS_ORIGIN, TRIT_ROOM)  # fmt: skip


@triton.jit
def store_row(
    row, slot, kv_head, chunks, halves, clip, prescale, num_kv_heads,
    IS_KEY: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
    CHUNK: tl.constexpr, CODES: tl.constexpr, PARAMETERS: tl.constexpr, MAX_CODE: tl.constexpr,
    IS_ORIGIN: tl.constexpr, TRIT_ROOM: tl.constexpr,
):  # fmt: skip
    """row [D] float32 of one token and kv head, quantized to slot [] int64."""
    t, chunk = slot % PAGE, (slot // PAGE * num_kv_heads + kv_head) * CHUNK
    row = saturate(row, 65504.0)
    if BITS == 16:
        d = tl.arange(0, D)
        if IS_KEY:
            to = d * PAGE + t
        else:
            to = t * D + d
        tl.store(halves + (chunk + CODES) // 2 + to, row.to(tl.float16))
    else:
        groups: tl.constexpr = D // GROUP
        g = tl.arange(0, groups)
        grouped = tl.reshape(row, (groups, GROUP))
        scale = tl.load(prescale + kv_head)
        alpha = tl.load(clip + kv_head * groups + g)
        broken = tl.max((grouped != grouped).to(tl.int32), 1) > 0
        low = tl.where(broken, float("nan"), tl.min(grouped, 1))
        high = tl.where(broken, float("nan"), tl.max(grouped, 1))
        if IS_ORIGIN:
            low, high = alpha * low, alpha * high
        else:
            middle, half = (low + high) * 0.5, (high - low) * 0.5 * alpha
            low, high = middle - half, middle + half
        step = tl.div_rn(tl.div_rn(high - low, MAX_CODE * 1.0), scale)
        zero = tl.div_rn(low, scale)
        at = PARAMETERS + chunk
        if BITS == 8:
            step, zero = to_float16(step), to_float16(zero)
            step = tl.where(step == 0, 1, step).to(tl.int16)  # the smallest, 2^-24
            read_step = step.to(tl.float16, bitcast=True).to(tl.float32)
            read_zero = zero.to(tl.float16, bitcast=True).to(tl.float32)
            tl.store(halves + at // 2 + g * PAGE + t, step.to(tl.float16, bitcast=True))
            tl.store(halves + at // 2 + (groups + g) * PAGE + t, zero.to(tl.float16, bitcast=True))
        else:
            step, zero = to_e4m3(step), to_e4m3(zero)
            step = tl.where(step == 0, 1, step)  # the smallest, 2^-9
            read_step, read_zero = e4m3(step).to(tl.float32), e4m3(zero).to(tl.float32)
            tl.store(chunks + at + g * PAGE + t, step.to(tl.uint8))
            tl.store(chunks + at + (groups + g) * PAGE + t, zero.to(tl.uint8))
        steps = tl.div_rn(tl.div_rn(grouped, scale) - read_zero[:, None], read_step[:, None])
        steps = tl.where(steps > 0, tl.where(steps < MAX_CODE, steps, MAX_CODE * 1.0), 0.0)  # NaN gives 0
        codes = tl.reshape(((steps + 8388608.0) - 8388608.0).to(tl.int32), (D,))  # half to even
        store_codes(chunks + chunk + CODES, codes, t, IS_KEY, BITS, PAGE, D, TRIT_ROOM)
