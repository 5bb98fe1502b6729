"""Decode steps over packed pages of 2 or 4 bits, in Triton.

What decides how fast they are is how many instructions a token takes (benchmarks/gpu_attention.py counts them): an H200
has 29 of a warp for each token of 136 bytes in the time that it takes to read it, and 15 at 72 bytes. Hence

- codes become floats by one mask, two at a time: bits of a word are the float16 subnormals code 2^(shift - 24), which
  tensor cores take. What a plane's shift makes of them is undone once, in queries and in sums;
- scales and zeros are applied to scores and weights, of which there are COLUMNS a token, and not to D channels:
      s[t] = sum_g scale[t, g] sum_{c in g} q[c] code[t, c] + zero[t, g] sum_{c in g} q[c]
      sums[c] = sum_t (p[t] scale[t, g]) code[t, c] + p[t] zero[t, g],   g the group of c;
- a program is one warp: warps that share a softmax wait for each other. Tiles have 8 columns;
- a lane owns tokens that lie side by side, whose parameters are words: row 8 j + i of a block of T tokens, which tensor
  cores give to lanes 4 i to 4 i + 3, is token T / 8 i + j;
- blocks that every column sees whole have a loop of their own, without masks.

A NaN is kept without being asked for: parameters are multiplied by 144, so that 448, the largest, stays a float16, and
480, which is what a NaN's bits would mean, becomes infinite; and infinity times 0, the code of a NaN, is NaN.
"""

import triton
import triton.language as tl

from kernels.gpu.attention import nothing, queries, shares, store_part
from kernels.gpu.quantized import recent_blocks

EXPAND = tl.constexpr(36864.0)  # 144 times the 2^8 by which the bits of an e4m3 are too small as those of a float16
QUERIES = tl.constexpr(14)  # queries are so many powers of two above their size, that a plane's shift may be taken off


@triton.jit
def halves(x):
    """Pairs in int32 [..] -> float16 [.., 2], the lower first."""
    low = x.to(tl.int16).to(tl.float16, bitcast=True)
    return tl.join(low, (x >> 16).to(tl.int16).to(tl.float16, bitcast=True))


@triton.jit
def planes(words, BITS: tl.constexpr):
    """words [tokens, W] int32 -> pairs of codes [tokens, W, 2, planes]: of bytes 0 and 2, of bytes 1 and 3."""
    x = tl.join(words, words >> 8)
    MASK: tl.constexpr = ((1 << BITS) - 1) * 0x10001
    if BITS == 4:
        return tl.join(x & MASK, x & (MASK << 4))
    else:
        a, b = tl.join(x & MASK, x & (MASK << 2)), tl.join(x & (MASK << 4), x & (MASK << 6))
        return tl.reshape(tl.permute(tl.join(a, b), (0, 1, 2, 4, 3)), (words.shape[0], words.shape[1], 2, 4))


@triton.jit
def own(x, GROUPS: tl.constexpr, T: tl.constexpr):
    """x [GROUPS, T] in the order of tokens -> in that of rows."""
    return tl.reshape(tl.permute(tl.reshape(x, (GROUPS, 8, T // 8)), (0, 2, 1)), (GROUPS, T))


@triton.jit
def parameters(words, GROUPS: tl.constexpr, PAGE: tl.constexpr, T: tl.constexpr):
    """Scales * 144 and zeros / 256 [GROUPS, T] float16 by rows. words: scales of the first group from the block's first
    token on."""
    at = words + tl.arange(0, GROUPS)[:, None] * (PAGE // 4) + tl.arange(0, T // 4)[None, :]
    w, z = tl.load(at), tl.load(at + GROUPS * (PAGE // 4))
    scales = halves(tl.join((w << 7) & 0x3F803F80, (w >> 1) & 0x3F803F80))  # [.., 2, 2]: of bytes 0, 2; 1, 3
    even = ((z << 7) & 0x3F803F80) | ((z << 8) & -0x7FFF8000)
    odd = ((z >> 1) & 0x3F803F80) | (z & -0x7FFF8000)
    zeros = halves(tl.join(even, odd))
    scales = tl.reshape(tl.permute(scales, (0, 1, 3, 2)), (GROUPS, T)) * EXPAND
    zeros = tl.reshape(tl.permute(zeros, (0, 1, 3, 2)), (GROUPS, T))
    return own(scales, GROUPS, T), own(zeros, GROUPS, T)


@triton.jit
def keys(words, BITS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, T: tl.constexpr, D: tl.constexpr):
    """Codes 2^(shift - 24) [groups, T, GROUP] float16. words: the first unit of the block's first token."""
    W: tl.constexpr = D * BITS // 32
    RUNS: tl.constexpr = 4 * W // GROUP if 4 * W > GROUP else 1  # groups of a plane
    MINE: tl.constexpr = GROUP // (4 * W) if GROUP > 4 * W else 1  # planes of a group
    word = tl.load(words + tl.arange(0, W)[None, :] * PAGE + tl.arange(0, T)[:, None])
    word = tl.reshape(tl.permute(tl.reshape(word, (8, T // 8, W)), (1, 0, 2)), (T, W))
    x = halves(planes(word, BITS))  # [T, W, 2, planes, 2]
    x = tl.reshape(x, (T, RUNS, W // RUNS, 2, 8 // BITS // MINE, MINE, 2))
    return tl.reshape(tl.permute(x, (4, 1, 0, 5, 2, 3, 6)), (D // GROUP, T, GROUP))


@triton.jit
def grouped_queries(x, BITS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr):
    """x [D, COLUMNS] float16 -> x 2^(QUERIES - shift) [groups, GROUP, COLUMNS], channels in the order of `keys`."""
    W: tl.constexpr = D * BITS // 32
    RUNS: tl.constexpr = 4 * W // GROUP if 4 * W > GROUP else 1
    MINE: tl.constexpr = GROUP // (4 * W) if GROUP > 4 * W else 1
    power = (127 + QUERIES - tl.arange(0, D) // (4 * W) * BITS) << 23
    x = (x.to(tl.float32) * power.to(tl.float32, bitcast=True)[:, None]).to(tl.float16)
    x = tl.reshape(x, (8 // BITS // MINE, MINE, RUNS, W // RUNS, 2, 2, COLUMNS))
    return tl.reshape(tl.permute(x, (0, 2, 1, 3, 5, 4, 6)), (D // GROUP, GROUP, COLUMNS))


@triton.jit
def values(words, BITS: tl.constexpr, GROUP: tl.constexpr, T: tl.constexpr, D: tl.constexpr):
    """Codes 2^(shift - 24) [groups, GROUP, T] float16. words: the row of the block's first token."""
    W: tl.constexpr = D * BITS // 32
    RUNS: tl.constexpr = 4 * W // GROUP if 4 * W > GROUP else 1
    MINE: tl.constexpr = GROUP // (4 * W) if GROUP > 4 * W else 1
    i = tl.arange(0, T // 2)
    at = words + (i // (T // 8) * (T // 4) + i % (T // 8))[:, None] * W + tl.arange(0, W)[None, :]
    a, b = tl.load(at), tl.load(at + T // 8 * W)  # tokens whose rows stand side by side
    if W < 8:  # lanes that share a word take a half each
        half = 16 * tl.arange(0, 2)[None, None, :]
        both = ((a[:, :, None] >> half) & 0xFFFF) | ((b[:, :, None] >> half) << 16)
    else:
        both = tl.join((a & 0xFFFF) | (b << 16), ((a >> 16) & 0xFFFF) | (b & -0x10000))
    x = halves(planes(tl.reshape(both, (T // 2, 2 * W)), BITS))  # [T / 2, (W, half), byte of it, planes, a and b]
    x = tl.reshape(x, (4, T // 8, RUNS, W // RUNS, 2, 2, 8 // BITS // MINE, MINE, 2))
    return tl.reshape(tl.permute(x, (6, 2, 7, 5, 4, 3, 1, 0, 8)), (D // GROUP, GROUP, T))


@triton.jit
def natural(x, BITS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums [groups, GROUP, COLUMNS] of weights and codes as `block` multiplies them -> [D, COLUMNS]."""
    W: tl.constexpr = D * BITS // 32
    RUNS: tl.constexpr = 4 * W // GROUP if 4 * W > GROUP else 1
    MINE: tl.constexpr = GROUP // (4 * W) if GROUP > 4 * W else 1
    power = (127 + 39 - tl.arange(0, D) // (4 * W) * BITS) << 23  # 24 of the codes, 15 of the weights
    x = tl.reshape(x, (8 // BITS // MINE, RUNS, MINE, 2, 2, W // RUNS, COLUMNS))
    x = tl.reshape(tl.permute(x, (0, 2, 1, 5, 4, 3, 6)), (D, COLUMNS))
    return x * (power.to(tl.float32, bitcast=True) / 144.0)[:, None]


@triton.jit
def eighths(x, T: tl.constexpr):
    """[.., T, COLUMNS] -> [.., 8, COLUMNS]: what each lane sums by itself."""
    if len(x.shape) == 2:
        return tl.sum(tl.reshape(x, (T // 8, 8, x.shape[1])), 0)
    else:
        return tl.sum(tl.reshape(x, (x.shape[0], T // 8, 8, x.shape[2])), 1)


@triton.jit
def block(
    words, base, position, last, window, num_sinks, xq, all_q, size, m, total, sums, shifts,
    MASKED: tl.constexpr, T: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
    K_BITS: tl.constexpr, K_GROUP: tl.constexpr, V_BITS: tl.constexpr, V_GROUP: tl.constexpr,
    V_AT: tl.constexpr, K_PARAMETERS: tl.constexpr, V_PARAMETERS: tl.constexpr,
):  # fmt: skip
    """Tokens base..base + T - 1 of one page; words is its chunk.

    scale 144 * products * 1024 / 144 are a group's part of a score, and zero / 256 * all_q is in the same units.
    """
    t = base % PAGE
    k = keys(words + t, K_BITS, K_GROUP, PAGE, T, D)
    scales, zeros = parameters(words + (K_PARAMETERS + t) // 4, D // K_GROUP, PAGE, T)
    products = tl.dot(k, xq)  # [groups, T, COLUMNS]
    shift = zeros.to(tl.float32)[:, :, None] * all_q[:, None, :]
    wide = tl.broadcast_to(scales.to(tl.float32)[:, :, None], products.shape)
    scores = tl.sum(tl.fma(products, wide, shift), 0)
    if MASKED:
        at = base + tl.arange(0, T) % 8 * (T // 8) + tl.arange(0, T) // 8
        needed = (at >= num_sinks) & (at <= last - window)
        scores = tl.where(needed[:, None] & (at[:, None] <= position[None, :] - window), scores, float("-inf"))
    highest, weights, shrink = shares(scores, size, m)
    total = tl.fma(total, tl.broadcast_to(shrink[None, :], total.shape), eighths(weights, T))
    v = values(words + V_AT // 4 + t * (D * V_BITS // 32), V_BITS, V_GROUP, T, D)
    scales, zeros = parameters(words + (V_PARAMETERS + t) // 4, D // V_GROUP, PAGE, T)
    if MASKED:
        scales, zeros = tl.where(needed[None, :], scales, 0.0), tl.where(needed[None, :], zeros, 0.0)
    shift = weights[None, :, :] * zeros.to(tl.float32)[:, :, None]
    shifts = tl.fma(shifts, tl.broadcast_to(shrink[None, None, :], shifts.shape), eighths(shift, T))
    scaled = weights.to(tl.float16)[None, :, :] * (scales * (2.0**-15))[:, :, None]
    return highest, total, tl.dot(v, scaled, sums * shrink[None, None, :]), shifts


@triton.jit(do_not_specialize=["max_pages", "max_recent", "num_sinks", "num_parts"])
def attend(
    q, words, recent, tables, recent_tables, tiles, key_prescale, value_prescale, part_sums, part_stats,
    factor, num_heads, num_kv_heads, max_pages, max_recent, num_sinks, num_parts,
    G: tl.constexpr, PAGE: tl.constexpr, RECENT: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    K_BITS: tl.constexpr, K_GROUP: tl.constexpr, V_BITS: tl.constexpr, V_GROUP: tl.constexpr,
    V_AT: tl.constexpr, K_PARAMETERS: tl.constexpr, V_PARAMETERS: tl.constexpr,
):  # fmt: skip
    """What attend of kernels/gpu/quantized.py computes, of which it takes the arguments.

    Reads token_bytes for each token and kv head, once for 8 columns, and 4 D bytes where it is read in high precision;
    about 0.6 D operations to unpack a token, 20 for each of its columns, 4 D COLUMNS on tensor cores.
    """
    T: tl.constexpr = PAGE if PAGE < BLOCK else BLOCK
    tile, kv_head, part = tiles + 7 * tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, q_row, out_row = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    first, rows, window, each = tl.load(tile + 3), tl.load(tile + 4), tl.load(tile + 5), tl.load(tile + 6)
    n = tl.arange(0, COLUMNS)
    position = first + n // G
    last = first + rows - 1
    start = part * each * SPLIT
    if start > last:
        return
    x, size = queries(q, q_row, rows, kv_head, num_heads, factor, G, D, D, COLUMNS)
    xq = grouped_queries(x, K_BITS, K_GROUP, D, COLUMNS)
    all_q = tl.sum(tl.reshape(x.to(tl.float32), (D // K_GROUP, K_GROUP, COLUMNS)), 1) * 36.0
    key_size = size * tl.load(key_prescale + kv_head) * (1024.0 / 144.0)
    table = tables + sequence.to(tl.int64) * max_pages
    recent_table = recent_tables + sequence.to(tl.int64) * max_recent
    m, total, summed = nothing(D, COLUMNS)
    total = tl.zeros((8, COLUMNS), tl.float32)
    sums = tl.zeros((D // V_GROUP, V_GROUP, COLUMNS), tl.float32)
    shifts = tl.zeros((D // V_GROUP, 8, COLUMNS), tl.float32)
    stop = tl.minimum(start + each * SPLIT, last + 1)
    end = tl.minimum(stop, last - window + 1)  # of packed tokens
    whole = tl.maximum(start, (num_sinks + T - 1) // T * T)
    tail = tl.maximum(whole, tl.minimum(end, first - window + 1) // T * T)
    for base in range(whole, tail, T):
        words_at = words + (tl.load(table + base // PAGE) * num_kv_heads + kv_head) * (CHUNK // 4)
        m, total, sums, shifts = block(
            words_at, base, position, last, window, num_sinks, xq, all_q, key_size, m, total, sums, shifts,
            False, T, PAGE, D, K_BITS, K_GROUP, V_BITS, V_GROUP, V_AT, K_PARAMETERS, V_PARAMETERS,
        )  # fmt: skip
    num_before = (tl.minimum(whole, tl.maximum(end, start)) - start + T - 1) // T
    num_after = (tl.maximum(end, tail) - tail + T - 1) // T
    for i in range(num_before + num_after):
        base = tl.where(i < num_before, start + i * T, tail + (i - num_before) * T)
        words_at = words + (tl.load(table + base // PAGE) * num_kv_heads + kv_head) * (CHUNK // 4)
        m, total, sums, shifts = block(
            words_at, base, position, last, window, num_sinks, xq, all_q, key_size, m, total, sums, shifts,
            True, T, PAGE, D, K_BITS, K_GROUP, V_BITS, V_GROUP, V_AT, K_PARAMETERS, V_PARAMETERS,
        )  # fmt: skip
    shift = tl.reshape(tl.broadcast_to((tl.sum(shifts, 1) * 256.0)[:, None, :], sums.shape), (D, COLUMNS))
    summed = natural(sums, V_BITS, V_GROUP, D, COLUMNS) + shift
    m, total, summed = recent_blocks(
        recent, recent_table, start, stop, position, last, window, first, num_sinks, kv_head, num_kv_heads,
        x, size, m, tl.sum(total, 0), summed * tl.load(value_prescale + kv_head), RECENT, RECENT, D, False,
    )  # fmt: skip
    has_column = (n // G < rows) & (position >= start)
    store_part(part_sums, part_stats, out_row, part, num_parts, kv_head, num_heads, has_column, m, total, summed,
               G, D, D, COLUMNS)  # fmt: skip
