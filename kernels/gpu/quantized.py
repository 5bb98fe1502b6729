"""Attention over quantized pages in Triton; kernels/attention/quantized/layout.py says how they lie.

Codes are loaded as words of 32 bits: those of 64 keys lie side by side, those of a value's row too, and each is read
once for all columns of a tile. They become float16 by no arithmetic but one subtraction: 0x6400 | code is 1024 + code,
for two codes of a word at once. Codes and scales are exact in float16 and, up to 7 bits, so is their product; one
rounding is left, of the sum with the zero. Prescales multiply the scores and the sums, in float32.

Nothing here asks for e4m3 in hardware, which sm_80 has not.
"""

import triton
import triton.language as tl

from kernels.gpu.attention import fold, nothing, plain_block, product, queries, saturate, store_part, weigh


@triton.jit
def e4m3(byte):
    """float8 e4m3 -> float16: its bits are those of a float16 2^8 too small; 127 is NaN. byte: integers, one each."""
    size = byte.to(tl.int16) & 0x7F
    value = ((size << 7) | ((byte.to(tl.int16) & 0x80) << 8)).to(tl.float16, bitcast=True) * 256.0
    return tl.where(size == 0x7F, float("nan"), value).to(tl.float16)


@triton.jit
def spread(words, BITS: tl.constexpr, D: tl.constexpr):
    """words [tokens, D BITS / 32] int32 -> codes [tokens, D] float16. Byte j of a row of n holds channels j + i n.

    Two bytes of a word, of which one lies 16 bits above the other, are spread at once.
    """
    x = tl.join(words, words >> 8)
    if BITS < 8:
        x = tl.join(x, x >> BITS)
    if BITS < 4:
        x = tl.join(x, x >> (2 * BITS))
    if BITS < 2:
        x = tl.join(x, x >> 4)
    both = (x & (((1 << BITS) - 1) * 0x10001)) | 0x64006400
    low, high = both.to(tl.int16).to(tl.float16, bitcast=True), (both >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    y = tl.join(low, high)  # [tokens, words, bit 0 of the byte, bits of i, bit 1 of the byte]
    if BITS == 8:
        y = tl.permute(y, (0, 1, 3, 2))
    elif BITS == 4:
        y = tl.permute(y, (0, 3, 1, 4, 2))
    elif BITS == 2:
        y = tl.permute(y, (0, 4, 3, 1, 5, 2))
    else:
        y = tl.permute(y, (0, 5, 4, 3, 1, 6, 2))
    return tl.reshape(y, (words.shape[0], D)) - 1024.0


@triton.jit
def load_words(words, at, needed, IS_KEY: tl.constexpr, PAGE: tl.constexpr, ROW: tl.constexpr, WORDS: tl.constexpr):
    """A plane of WORDS words a token: token by token in rows of ROW words, or unit by unit (keys).

    Keys have no mask: one for each token would have their words, which lie side by side, loaded one by one.
    """
    w = tl.arange(0, WORDS)
    if IS_KEY:
        return tl.load(words + w[None, :] * PAGE + at[:, None])
    else:
        return tl.load(words + at[:, None] * ROW + w[None, :], needed[:, None], other=0)


@triton.jit
def load_codes(
    chunk, words, codes_at, at, needed,
    IS_KEY: tl.constexpr, BITS: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Codes [tokens, D] float16 of the tokens `at` of one chunk; BITS is 1 for 1.5. codes_at in bytes."""
    if BITS == 1:
        num_bytes: tl.constexpr = (D + 4) // 5
        d = tl.arange(0, D)
        byte, digit = d % num_bytes, d // num_bytes
        if IS_KEY:
            packed = tl.load(chunk + codes_at + byte[None, :] * PAGE + at[:, None]).to(tl.int32)
        else:
            offsets = at[:, None] * num_bytes + byte[None, :]
            packed = tl.load(chunk + codes_at + offsets, needed[:, None], other=0).to(tl.int32)
        power = tl.where(digit == 0, 1, tl.where(digit == 1, 3, tl.where(digit == 2, 9, tl.where(digit == 3, 27, 81))))
        codes = (((packed * power[None, :]) & 255) * 3) >> 8
        return (codes | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - 1024.0
    elif BITS == 3:
        plane = words + codes_at // 4
        row: tl.constexpr = 3 * D // 32
        low = spread(load_words(plane, at, needed, IS_KEY, PAGE, row, D // 16), 2, D)
        if IS_KEY:
            plane += PAGE * (D // 16)
        else:
            plane += D // 16
        return low + spread(load_words(plane, at, needed, IS_KEY, PAGE, row, D // 32), 1, D) * 4.0
    else:
        num_words: tl.constexpr = D * BITS // 32
        return spread(load_words(words + codes_at // 4, at, needed, IS_KEY, PAGE, num_words, num_words), BITS, D)


@triton.jit
def load_rows(
    chunk, words, halves, codes_at, parameters_at, at, needed,
    IS_KEY: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """code s + z [tokens, D] float16 of the tokens `at` of one chunk, in units of the prescale; float16 rows as they
    are. Those of 8 bits saturate. Values that are not needed are 0, as a weight of 0 would not hide a NaN; keys are
    whatever the page holds."""
    if BITS == 16:
        d = tl.arange(0, D)
        if IS_KEY:
            return tl.load(halves + codes_at // 2 + d[None, :] * PAGE + at[:, None])
        else:
            return tl.load(halves + codes_at // 2 + at[:, None] * D + d[None, :], needed[:, None], other=0)
    else:
        codes = load_codes(chunk, words, codes_at, at, needed, IS_KEY, BITS, PAGE, D)
        tokens: tl.constexpr = at.shape[0]
        groups: tl.constexpr = D // GROUP
        g = tl.arange(0, groups)
        offsets = g[None, :] * PAGE + at[:, None]
        x = tl.reshape(codes, (tokens, groups, GROUP))
        if BITS == 8:
            scales = tl.load(halves + parameters_at // 2 + offsets).to(tl.float32)
            zeros = tl.load(halves + parameters_at // 2 + groups * PAGE + offsets).to(tl.float32)
        else:
            scales = e4m3(tl.load(chunk + parameters_at + offsets))
            zeros = e4m3(tl.load(chunk + parameters_at + groups * PAGE + offsets))
        if not IS_KEY:
            scales = tl.where(needed[:, None], scales, 0.0)
            zeros = tl.where(needed[:, None], zeros, 0.0)
        if BITS == 8:
            wide = x.to(tl.float32) * scales[:, :, None] + zeros[:, :, None]
            y = saturate(wide, 65504.0).to(tl.float16)
        else:
            y = x * scales[:, :, None] + zeros[:, :, None]
        return tl.reshape(y, (tokens, D))


@triton.jit
def packed_blocks(
    chunks, words, halves, table, start, stop, position, last, window, num_sinks, kv_head, num_kv_heads,
    x, size, m, total, summed,
    BLOCK: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
    K_BITS: tl.constexpr, K_GROUP: tl.constexpr, V_BITS: tl.constexpr, V_GROUP: tl.constexpr,
    V_AT: tl.constexpr, K_PARAMETERS: tl.constexpr, V_PARAMETERS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Packed tokens of positions start..stop - 1, in order; sums in units of the values' prescale."""
    STEP: tl.constexpr = PAGE if PAGE < BLOCK else BLOCK
    for base in range(start, tl.minimum(stop, last - window + 1), STEP):
        at = base + tl.arange(0, STEP)
        needed = (at >= num_sinks) & (at <= last - window)
        visible = needed[:, None] & (at[:, None] <= position[None, :] - window)
        t = base % PAGE + tl.arange(0, STEP)
        page = tl.load(table + base // PAGE)  # int64
        chunk = (page * num_kv_heads + kv_head) * CHUNK
        k = load_rows(chunks + chunk, words + chunk // 4, halves + chunk // 2, 0, K_PARAMETERS, t, needed,
                      True, K_BITS, K_GROUP, PAGE, D)  # fmt: skip
        weights, m, total, shrink = weigh(product(k, x, None, WIDE), size, visible, m, total)
        v = load_rows(chunks + chunk, words + chunk // 4, halves + chunk // 2, V_AT, V_PARAMETERS, t, needed,
                      False, V_BITS, V_GROUP, PAGE, D)  # fmt: skip
        summed = product(tl.trans(v), weights.to(tl.float16), summed * shrink[None, :], WIDE)
    return m, total, summed


@triton.jit
def recent_blocks(
    recent, table, start, stop, position, last, window, first, num_sinks, kv_head, num_kv_heads,
    x, size, m, total, summed, BLOCK: tl.constexpr, RECENT: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Those of positions start..stop - 1 that are read in high precision."""
    before = tl.where(window > 0, first - window, last)  # the last position that no window reaches
    for base in range(start, stop, BLOCK):
        if (base < num_sinks) | ((base + BLOCK > before + 1) & (window > 0)):
            at = base + tl.arange(0, BLOCK)
            run = base + tl.arange(0, BLOCK // RECENT) * RECENT
            wanted = (run <= last) & ((run < num_sinks) | (run + RECENT > before + 1))
            needed = (at <= last) & ((at < num_sinks) | (at > before))
            high = (at < num_sinks)[:, None] | (at[:, None] > position[None, :] - window)
            visible = (at[:, None] <= position[None, :]) & high
            m, total, summed = plain_block(
                recent, table, base, needed, wanted, kv_head, num_kv_heads, x, size, visible,
                m, total, summed, BLOCK, RECENT, D, D, WIDE, True,
            )  # fmt: skip
    return m, total, summed


@triton.jit(do_not_specialize=["max_pages", "max_recent", "num_sinks", "num_parts"])
def attend(
    q, chunks, words, halves, recent, tables, recent_tables, tiles, key_prescale, value_prescale, part_sums, part_stats,
    factor, num_heads, num_kv_heads, max_pages, max_recent, num_sinks, num_parts,
    G: tl.constexpr, PAGE: tl.constexpr, RECENT: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    K_BITS: tl.constexpr, K_GROUP: tl.constexpr, V_BITS: tl.constexpr, V_GROUP: tl.constexpr,
    V_AT: tl.constexpr, K_PARAMETERS: tl.constexpr, V_PARAMETERS: tl.constexpr,
    WIDE: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """For each part p of the context: m = max_j s_j, sum_j 2^(s_j - m), sum_j 2^(s_j - m) v_j,   s_j = factor q . k_j

    j runs over the positions of p up to the column's own, i; k_j and v_j are the recent page's iff j < S or i - j < W.
    In each split packed tokens come first, in order, then BLOCKs of recent ones.

    chunks, words and halves are the same pages as bytes, int32 and float16. Reads token_bytes for each token and kv
    head of a tile, and 4 D bytes where it is read in high precision; about 7 D operations to unpack a token,
    4 D COLUMNS on tensor cores.
    """
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
    key_size, value_size = size, 1.0
    if K_BITS != 16:
        key_size = size * tl.load(key_prescale + kv_head)
    if V_BITS != 16:
        value_size = tl.load(value_prescale + kv_head)
    table = tables + sequence.to(tl.int64) * max_pages
    recent_table = recent_tables + sequence.to(tl.int64) * max_recent
    m, total, summed = nothing(D, COLUMNS)
    stop = tl.minimum(start + each * SPLIT, last + 1)
    if not FOLD:
        m, total, summed = packed_blocks(
            chunks, words, halves, table, start, stop, position, last, window, num_sinks, kv_head, num_kv_heads,
            x, key_size, m, total, summed,
            BLOCK, PAGE, D, CHUNK, K_BITS, K_GROUP, V_BITS, V_GROUP, V_AT, K_PARAMETERS, V_PARAMETERS, WIDE,
        )  # fmt: skip
        m, total, summed = recent_blocks(
            recent, recent_table, start, stop, position, last, window, first, num_sinks, kv_head, num_kv_heads,
            x, size, m, total, summed * value_size, BLOCK, RECENT, D, WIDE,
        )  # fmt: skip
    else:
        for base in range(start, stop, SPLIT):
            end = tl.minimum(base + SPLIT, stop)
            m2, total2, summed2 = nothing(D, COLUMNS)
            m2, total2, summed2 = packed_blocks(
                chunks, words, halves, table, base, end, position, last, window, num_sinks, kv_head, num_kv_heads,
                x, key_size, m2, total2, summed2,
                BLOCK, PAGE, D, CHUNK, K_BITS, K_GROUP, V_BITS, V_GROUP, V_AT, K_PARAMETERS, V_PARAMETERS, WIDE,
            )  # fmt: skip
            m2, total2, summed2 = recent_blocks(
                recent, recent_table, base, end, position, last, window, first, num_sinks, kv_head, num_kv_heads,
                x, size, m2, total2, summed2 * value_size, BLOCK, RECENT, D, WIDE,
            )  # fmt: skip
            m, total, summed = fold(m, total, summed, m2, total2, summed2)
    has_column = (n // G < rows) & (position >= start)
    store_part(part_sums, part_stats, out_row, part, num_parts, kv_head, num_heads, has_column, m, total, summed,
               G, D, D, COLUMNS)  # fmt: skip
