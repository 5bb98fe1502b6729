"""The Triton kernels for integer weights and activations that the format rounds to integers (W8A8, W4A8)."""

import triton
import triton.language as tl

TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and taken off again, it rounds half to even


@triton.jit
def scale_of(lowest, highest, SYMMETRIC: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """scale and zero of a token whose channels lie between `lowest`, at most 0, and `highest`, at least 0, as Rounding
    has them (kernels/linear/rounding.py). Divisions are exact."""
    zero = tl.full((), 0.0, tl.float32)
    if SYMMETRIC:
        scale = tl.div_rn(tl.maximum(highest, -lowest), (HIGH - LOW) / 2)
    else:
        scale = tl.div_rn(highest - lowest, HIGH - LOW)
    scale = tl.where(scale == 0, 1.1920928955078125e-07, scale)
    if not SYMMETRIC:
        zero = tl.minimum(tl.maximum(LOW - tl.div_rn(lowest, scale), LOW), HIGH)
        zero = (zero + TO_INTEGER) - TO_INTEGER
    return scale, zero


@triton.jit
def round_tokens(
    x, fixed_scale, fixed_zero, codes, scales, zeros, counts, width, padded,
    LOW: tl.constexpr, HIGH: tl.constexpr, SYMMETRIC: tl.constexpr, STATIC: tl.constexpr, V: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """a = round(clamp(x / scale + zero)),  half to even;  scale and zero of the token, or those that are given
    counts[t, j] = sum of a over run j of V channels

    A program is a token; a NaN among its channels becomes its scale. Reads 4 bytes a channel, half of them again, and
    writes 1, for 8 operations. codes [num_tokens, padded] have zeros past the last channel.
    """
    token = tl.program_id(0).to(tl.int64)
    x += token * width
    lowest, highest = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    broken = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        wide = tl.load(x + k, k < width, other=0).to(tl.float32)
        lowest, highest, broken = tl.minimum(lowest, wide), tl.maximum(highest, wide), broken | (wide != wide)
    if STATIC:
        scale, zero = tl.load(fixed_scale), tl.load(fixed_zero)
    else:
        scale, zero = scale_of(tl.min(lowest, 0), tl.max(highest, 0), SYMMETRIC, LOW, HIGH)
    for start in range(0, padded, BLOCK):
        k = start + tl.arange(0, BLOCK)
        wide = tl.load(x + k, k < width, other=0).to(tl.float32)
        rounded = tl.div_rn(wide, scale + tl.zeros((BLOCK,), tl.float32)) + zero
        rounded = (tl.minimum(tl.maximum(rounded, LOW), HIGH) + TO_INTEGER) - TO_INTEGER
        rounded = tl.where(k < width, rounded, 0.0)
        tl.store(codes + token * padded + k, rounded.to(tl.int8), k < padded)
        j = start // V + tl.arange(0, BLOCK // V)
        sums = tl.sum(tl.reshape(rounded, (BLOCK // V, V)), 1).to(tl.int32)
        tl.store(counts + token * (padded // V) + j, sums, j < padded // V)
    tl.store(scales + token, tl.where(tl.max(broken, 0) > 0, float("nan"), scale))
    tl.store(zeros + token, zero.to(tl.int32))


@triton.jit
def scaled(exact, count, scales, zeros, at, PLANES: tl.constexpr, ZEROS: tl.constexpr):
    """s (sum q a - z A), float32. exact: sum q a, 16 times as large with two planes; count: A."""
    if PLANES == 2:
        exact = exact >> 4
    if ZEROS:
        exact -= tl.load(zeros + at).to(tl.int32)[:, None] * count[None, :]
    return exact.to(tl.float32) * tl.load(scales + at).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=["num_tokens", "blocks_per_split"])
def multiply(
    codes, token_scales, token_zeros, counts, weights, scales, zeros, sums, out,
    num_tokens, padded, out_features, num_blocks, num_groups, blocks_per_split,
    GROUP: tl.constexpr, V: tl.constexpr, PLANES: tl.constexpr, WHOLE: tl.constexpr, ZEROS: tl.constexpr,
    TOKEN_ZEROS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y[p, t, n] = x_scale[t] (sum_{j in p} s[n, j] (sum_{k in j} q[n, k] a[t, k] - z[n, j] A[t, j]) - x_zero[t] Q[n])
    A[t, j] = sum_{k in j} a[t, k],   Q[n] = sum_j s[n, j] sum_{k in j} (q[n, k] - z[n, j]), taken off in one part

    p are the parts of the channels, j runs of V channels, or all of p where a row has one scale. Sums in j are exact
    integers, on tensor cores; the others in float32, in order. Two codes of 4 bits, V channels apart, share a byte;
    each is multiplied as the upper half of one.

    Reads the matrix once for each BLOCK_M tokens; 2 T N K operations on tensor cores, N K to unpack 4 bits and, but for
    one scale a row, 2 T N K / V to scale, twice as many with zero points.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    t = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    part_of_k = tl.program_id(2)
    row, token = tl.minimum(n, out_features - 1), tl.minimum(t, num_tokens - 1)
    xs_at = codes + tl.arange(0, V)[:, None] + token.to(tl.int64)[None, :] * padded
    at = weights + row.to(tl.int64)[:, None] * (num_blocks * V) + tl.arange(0, V)[None, :]
    exact = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    count = tl.zeros((BLOCK_M,), tl.int32)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first = part_of_k * blocks_per_split
    for block in range(first, tl.minimum(first + blocks_per_split, num_blocks)):
        word = tl.load(at + block * V)  # int8 [BLOCK_N, V]
        for j in tl.static_range(PLANES):
            xs = tl.load(xs_at + (block * PLANES + j) * V)  # int8 [V, BLOCK_M]
            q = word
            if PLANES == 2:
                q = (word << (4 - 4 * j)) & -16
            exact = tl.dot(q, xs, exact, out_dtype=tl.int32)
            if ZEROS:
                count += tl.load(counts + token * (num_blocks * PLANES) + block * PLANES + j)
            if not WHOLE:
                group = tl.minimum((block * PLANES + j) * V // GROUP, num_groups - 1)
                total += scaled(exact, count, scales, zeros, group * out_features + row, PLANES, ZEROS)
                exact = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
                count = tl.zeros((BLOCK_M,), tl.int32)
    if WHOLE:
        total = scaled(exact, count, scales, zeros, row, PLANES, ZEROS)
    if TOKEN_ZEROS:
        token_zero = tl.load(token_zeros + token).to(tl.float32)
        total -= tl.where(part_of_k == 0, tl.load(sums + row), 0.0)[:, None] * token_zero[None, :]
    total *= tl.load(token_scales + token)[None, :]
    to = (part_of_k * num_tokens + t[None, :]).to(tl.int64) * out_features + n[:, None]
    tl.store(out + to, total.to(out.dtype.element_ty), (n < out_features)[:, None] & (t < num_tokens)[None, :])
