"""The Triton kernels for what formats do to activations before a product, in float32: Rounding (kernels/linear/
rounding.py) and BlockRotation (kernels/linear/transforms.py). kernels/gpu/transforms.py calls them.

Each operation of a rounding is rounded by itself: divisions are exact, and it is compiled with enable_fp_fusion off.
"""

import triton
import triton.language as tl

INT, FLOAT8, FLOAT4 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # what codes are
# What scales are rounded to, as Rounding.scale_grid has it, or that they are given.
PLAIN, E4M3, E8M0, UP, THIRD, DEVIATION = (tl.constexpr(i) for i in range(6))
GIVEN = tl.constexpr(6)
TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and taken off again, it rounds half to even
LEAST = tl.constexpr(1e-8)
GAUSSIAN = tl.constexpr(2.92247856 / 6)


@triton.jit
def near_e4m3(x):
    """The nearest e4m3, half to even, of numbers from -448 to 448, as float32."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    small = (x + 24576.0) - 24576.0  # 1.5 * 2^14: steps of 2^-9
    return tl.where(tl.abs(x) < 0.015625, small, normal)


@triton.jit
def near(x, GRID: tl.constexpr):
    """The nearest code of numbers between the lowest and the highest, half to even."""
    if GRID == INT:
        found = (x + TO_INTEGER) - TO_INTEGER
    elif GRID == FLOAT8:
        found = near_e4m3(x)
    else:
        size = tl.abs(x)
        step = tl.where(size < 2, 6291456.0, tl.where(size < 4, 12582912.0, 25165824.0))  # of 1/2, 1 and 2
        found = (x + step) - step
    return found


@triton.jit
def power_of_two(bits):
    """Of a float32's bits, 2^floor(log2 x)."""
    return (bits & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def sum_of(x, C: tl.constexpr, LEVELS: tl.constexpr):
    """x [groups, C] -> [groups], halves onto halves."""
    groups: tl.constexpr = x.shape[0]
    for i in tl.static_range(LEVELS):
        x = tl.sum(tl.reshape(x, (groups, 2, C >> (i + 1))), 1)
    return tl.reshape(x, (groups,))


@triton.jit
def scale_of(peak, unit, SCALE: tl.constexpr, HIGH: tl.constexpr, SPAN: tl.constexpr, LARGEST: tl.constexpr):
    """The scale of groups of at most `peak`. SPAN is half of what codes span, 2^LARGEST the power of two below HIGH."""
    if SCALE == THIRD:
        scale = tl.div_rn(power_of_two((peak + LEAST).to(tl.int32, bitcast=True)), 3.0)
    elif SCALE == E8M0:
        exponent = ((peak.to(tl.int32, bitcast=True) + (1 << 21)) >> 23) - LARGEST
        scale = (tl.maximum(exponent, 1) << 23).to(tl.float32, bitcast=True)
    else:
        scale = tl.div_rn(peak, SPAN)
        if SCALE == E4M3:
            step = tl.load(unit) + tl.zeros_like(scale)
            kept = near_e4m3(tl.minimum(tl.div_rn(scale, step), 448.0))
            scale = tl.where(kept == 0, 0.125, kept) * step
        else:
            scale = tl.where(scale == 0, 1.1920928955078125e-07, scale)
        if SCALE == UP:
            room = tl.where(scale < 1, 18446744073709551616.0, 1.0)  # 2^64, so that none is subnormal
            bits = (scale * room).to(tl.int32, bitcast=True)
            scale = tl.div_rn(power_of_two(bits + 0x7FFFFF), room)
    return scale


@triton.jit
def round_groups(
    x, given_scale, given_zero, unit, out, width, channels, num_groups,
    GRID: tl.constexpr, SCALE: tl.constexpr, SYMMETRIC: tl.constexpr, ZERO: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, LARGEST: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """x^ = s (near(clamp(x / s + z)) - z),   s and z of each group of channels, or given

    A program is GROUPS groups of a token, read C channels at a time. A NaN makes its group NaN, or itself where the
    scale is given. 4 bytes a channel, 6 where a group is longer than C; 10 to 20 operations.
    """
    token, g = tl.program_id(0).to(tl.int64), tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    c = tl.arange(0, C)
    at = g[:, None] * channels + c[None, :]
    x += token * width
    out += token * width
    zero = tl.zeros((GROUPS,), tl.float32)
    if SCALE == GIVEN:
        scale = zero + tl.load(given_scale)
        if ZERO:
            zero += tl.load(given_zero)
    else:
        lowest, highest = tl.zeros((GROUPS, C), tl.float32), tl.zeros((GROUPS, C), tl.float32)
        broken = tl.zeros((GROUPS, C), tl.int32)
        for start in range(0, channels, C):
            inside = (start + c < channels)[None, :] & (at + start < width) & (g < num_groups)[:, None]
            wide = tl.load(x + at + start, inside, other=0).to(tl.float32)
            lowest, highest, broken = tl.minimum(lowest, wide), tl.maximum(highest, wide), broken | (wide != wide)
        low, high = tl.min(lowest, 1), tl.max(highest, 1)
        if SCALE == DEVIATION:
            wide = tl.load(x + at, (at < width) & (g < num_groups)[:, None], other=0).to(tl.float32)
            mean = tl.div_rn(sum_of(wide, C, LEVELS), C * 1.0)
            spread = tl.div_rn(sum_of(wide * wide, C, LEVELS), C * 1.0) - mean * mean
            spread = tl.sqrt_rn(tl.maximum(spread, 0.0))
            scale = power_of_two((spread * GAUSSIAN + LEAST).to(tl.int32, bitcast=True))
        elif SYMMETRIC:
            scale = scale_of(tl.maximum(high, -low), unit, SCALE, HIGH, (HIGH - LOW) / 2, LARGEST)
        else:
            scale = tl.div_rn(high - low, HIGH - LOW)
            scale = tl.where(scale == 0, 1.1920928955078125e-07, scale)
            zero = tl.minimum(tl.maximum(LOW - tl.div_rn(low, scale), LOW), HIGH)
            zero = (zero + TO_INTEGER) - TO_INTEGER
        scale = tl.where(tl.max(broken, 1) > 0, float("nan"), scale)
    for start in range(0, channels, C):
        inside = (start + c < channels)[None, :] & (at + start < width) & (g < num_groups)[:, None]
        wide = tl.load(x + at + start, inside, other=0).to(tl.float32)
        code = tl.div_rn(wide, scale[:, None] + tl.zeros((GROUPS, C), tl.float32)) + zero[:, None]
        code = near(tl.minimum(tl.maximum(code, LOW), HIGH), GRID)
        rounded = tl.where(wide != wide, wide, (code - zero[:, None]) * scale[:, None])
        tl.store(out + at + start, rounded.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["num_tokens"])
def rotate_blocks(
    x, matrices, out, num_tokens, width, size, is_shared,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[t, r size + i] = sum_j matrices[r, i, j] x[t, r size + j],  one matrix for all runs r where is_shared is 1

    A program is BLOCK_N channels of a run for BLOCK_M tokens. Products and sums in float32, BLOCK_K at a time, in
    order; 2 size operations a channel. Reads a matrix once for each BLOCK_M tokens.
    """
    run = tl.program_id(1)
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    at = t.to(tl.int64) * width + run * size
    matrices += (run * (1 - is_shared)).to(tl.int64) * size * size
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, size, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        xs = tl.load(x + at[:, None] + j[None, :], (t < num_tokens)[:, None] & (j < size)[None, :], other=0)
        columns = tl.load(matrices + i[None, :] * size + j[:, None], (i < size)[None, :] & (j < size)[:, None], other=0)
        total = tl.dot(xs.to(tl.float32), columns, total, input_precision="ieee")
    inside = (t < num_tokens)[:, None] & (i < size)[None, :]
    tl.store(out + at[:, None] + i[None, :], total.to(out.dtype.element_ty), inside)
