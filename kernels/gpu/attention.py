"""Attention over paged keys and values in Triton; kernels/gpu/quantized.py adds packed pages.

A program serves one *tile*: COLUMNS columns, each a query row and one of the G heads that share a kv head, so that keys
and values are read once for all of them. Keys, and values turned, stand on the left of a product: tokens or channels
fill its M, columns its N. A tile of a prompt may be WIDE: then columns fill M and tokens N, where a softmax is summed
within a thread. Either is written [tokens, COLUMNS]; `product` turns it.

A context is cut into parts of whole *splits* of SPLIT positions, a program each, block by block in order; `combine`
adds them up. There are no atomics.

Where FOLD is set each split has a softmax of its own; splits are folded in order, by `fold`, either in the program (a
prompt) or by `merge` (a decode step, one split a part). Every operation of a column is the same in both, and what a
column does not see adds exact zeros, so that a row's result does not depend on the other rows.

Scores are in powers of two. Queries are divided by the power of two below their largest channel, so that float16 holds
them. Weights are rounded to float16 to be multiplied, not to be summed; they are 2^15 times what they would be, so that
few are too small for it.
"""

import triton
import triton.language as tl


@triton.jit
def queries(q, q_row, rows, kv_head, num_heads, factor, G: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
            COLUMNS: tl.constexpr):  # fmt: skip
    """q factor / size [D, COLUMNS] float16, zero where there is no row; size [COLUMNS] float32, a power of two."""
    n = tl.arange(0, COLUMNS)
    d = tl.arange(0, D)
    at = ((q_row + n // G).to(tl.int64) * num_heads + kv_head * G + n % G) * HEAD_DIM
    inside = (n // G < rows)[None, :] & (d < HEAD_DIM)[:, None]
    x = tl.load(q + at[None, :] + d[:, None], inside, other=0).to(tl.float32) * factor
    largest = tl.maximum(tl.max(tl.abs(x), 0), 1e-30)
    exponent = largest.to(tl.int32, bitcast=True) & 0x7F800000
    size = exponent.to(tl.float32, bitcast=True)
    inverse = (0x7F000000 - exponent).to(tl.float32, bitcast=True)  # 2^-e, exactly
    return (x * inverse[None, :]).to(tl.float16), size


@triton.jit
def nothing(D: tl.constexpr, COLUMNS: tl.constexpr):
    """m, total and sums of a softmax over no tokens."""
    m = tl.full((COLUMNS,), float("-inf"), tl.float32)
    return m, tl.zeros((COLUMNS,), tl.float32), tl.zeros((D, COLUMNS), tl.float32)


@triton.jit
def weigh(scores, size, visible, m, total):
    """One block of an online softmax of scores size, [tokens, COLUMNS] and [COLUMNS] -> weights float32, m, total, and
    what the sums so far are multiplied with."""
    scores = tl.where(visible, scores, float("-inf"))
    highest, weights, shrink = shares(scores, size, m)
    return weights, highest, tl.fma(total, shrink, tl.sum(weights, 0)), shrink


@triton.jit
def shares(scores, size, m):
    """The highest of m and of scores size; weights, 2^15 for the highest; what weights so far are multiplied with."""
    highest = tl.maximum(m, tl.max(scores, 0) * size)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(tl.fma(scores, tl.broadcast_to(size[None, :], scores.shape), 15.0 - base[None, :]))
    return highest, weights, tl.exp2(m - base)


@triton.jit
def fold(m, total, summed, m2, total2, summed2):
    """Two parts of a context as one. m, total broadcast with summed. Written as fma, so that no compiler may choose."""
    highest = tl.maximum(m, m2)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    first, second = tl.exp2(m - base), tl.exp2(m2 - base)
    return highest, tl.fma(total, first, total2 * second), tl.fma(summed, first, summed2 * second)


@triton.jit
def product(a, b, plus, WIDE: tl.constexpr):
    """a b + plus. WIDE: as (b^T a^T + plus^T)^T, so that the columns of b fill the M of tensor cores."""
    if WIDE:
        if plus is not None:
            plus = tl.trans(plus)
        return tl.trans(tl.dot(tl.trans(b), tl.trans(a), plus))
    else:
        return tl.dot(a, b, plus)


@triton.jit
def plain_block(
    pages, table, base, needed, wanted, kv_head, num_kv_heads, x, size, visible, m, total, summed,
    BLOCK: tl.constexpr, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    CAN_MISS: tl.constexpr,
):  # fmt: skip
    """Tokens base..base + BLOCK - 1 out of float16 pages of PAGE tokens (kernels/attention/f16/layout.py).

    They are read in runs of tokens of one page, so that keys too, whose tokens lie side by side, are loaded by vectors:
    a page for each token, or a mask for each, would make that 2 bytes at a time. wanted [runs]: what is read at all;
    needed [BLOCK]: whose values are. With CAN_MISS a run whose page id is negative makes its scores NaN.
    """
    RUN: tl.constexpr = PAGE if PAGE < BLOCK else BLOCK
    RUNS: tl.constexpr = BLOCK // RUN
    i, d = tl.arange(0, RUN), tl.arange(0, D)
    at = base + tl.arange(0, RUNS) * RUN
    page = tl.load(table + at // PAGE, wanted, other=0)  # int64
    head = (page * 2 * num_kv_heads + kv_head) * (PAGE * HEAD_DIM)
    has_page = (wanted & (page >= 0))[:, None, None]
    keys = (head + at % PAGE)[:, None, None] + (d * PAGE)[None, :, None] + i[None, None, :]
    k = tl.load(pages + keys, has_page & (d < HEAD_DIM)[None, :, None], other=0)  # [RUNS, D, RUN]
    scores = product(tl.reshape(tl.permute(k, (0, 2, 1)), (BLOCK, D)), x, None, WIDE)
    if CAN_MISS:
        missing = tl.reshape(tl.broadcast_to((page < 0)[:, None], (RUNS, RUN)), (BLOCK,))
        scores = tl.where(missing[:, None], float("nan"), scores)
    weights, m, total, shrink = weigh(scores, size, visible, m, total)
    head += num_kv_heads * (PAGE * HEAD_DIM) + at % PAGE * HEAD_DIM
    values = head[:, None, None] + (i * HEAD_DIM)[None, :, None] + d[None, None, :]
    inside = has_page & tl.reshape(needed, (RUNS, RUN))[:, :, None] & (d < HEAD_DIM)[None, None, :]
    v = tl.reshape(tl.load(pages + values, inside, other=0), (BLOCK, D))
    return m, total, product(tl.trans(v), weights.to(tl.float16), summed * shrink[None, :], WIDE)


@triton.jit
def plain_blocks(
    pages, table, start, stop, position, last, kv_head, num_kv_heads, x, size, m, total, summed,
    BLOCK: tl.constexpr, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Positions start..stop - 1 block by block in order. position: [COLUMNS], the last that each column sees."""
    RUN: tl.constexpr = PAGE if PAGE < BLOCK else BLOCK
    for base in range(start, stop, BLOCK):
        at = base + tl.arange(0, BLOCK)
        visible = at[:, None] <= position[None, :]
        wanted = base + tl.arange(0, BLOCK // RUN) * RUN <= last
        m, total, summed = plain_block(
            pages, table, base, at <= last, wanted, kv_head, num_kv_heads, x, size, visible, m, total, summed,
            BLOCK, PAGE, HEAD_DIM, D, WIDE, False,
        )  # fmt: skip
    return m, total, summed


@triton.jit
def store_part(
    part_sums, part_stats, out_row, part, num_parts, kv_head, num_heads, has_column, m, total, summed,
    G: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """part_sums [rows, num_heads, num_parts, HEAD_DIM] float32; part_stats [.., num_parts, 2]: highest score, total."""
    n, d = tl.arange(0, COLUMNS), tl.arange(0, D)
    to = ((out_row + n // G).to(tl.int64) * num_heads + kv_head * G + n % G) * num_parts + part
    tl.store(part_stats + 2 * to, m, has_column)
    tl.store(part_stats + 2 * to + 1, total, has_column)
    inside = has_column[None, :] & (d < HEAD_DIM)[:, None]
    tl.store(part_sums + to[None, :] * HEAD_DIM + d[:, None], summed, inside)


@triton.jit(do_not_specialize=["max_pages", "num_parts"])
def attend(
    q, pages, tables, tiles, part_sums, part_stats, factor, num_heads, num_kv_heads, max_pages, num_parts,
    G: tl.constexpr, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """For each part p of the context: m = max_j s_j, sum_j 2^(s_j - m), sum_j 2^(s_j - m) v_j,   s_j = factor q . k_j

    j runs over the positions of p up to the column's own; products in float16, summed in float32.

    Reads 4 D bytes a token and kv head for each tile, for 4 D COLUMNS operations on tensor cores; writes 4 D + 8 bytes
    for each part of a row.
    """
    tile, kv_head, part = tiles + 7 * tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, q_row, out_row = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    first, rows = tl.load(tile + 3), tl.load(tile + 4)
    each = tl.load(tile + 6)
    n = tl.arange(0, COLUMNS)
    position = first + n // G
    last = first + rows - 1
    start = part * each * SPLIT
    x, size = queries(q, q_row, rows, kv_head, num_heads, factor, G, HEAD_DIM, D, COLUMNS)
    table = tables + sequence.to(tl.int64) * max_pages
    m, total, summed = nothing(D, COLUMNS)
    stop = tl.minimum(start + each * SPLIT, last + 1)
    if not FOLD:
        m, total, summed = plain_blocks(
            pages, table, start, stop, position, last, kv_head, num_kv_heads, x, size,
            m, total, summed, BLOCK, PAGE, HEAD_DIM, D, WIDE,
        )  # fmt: skip
    else:
        for base in range(start, stop, SPLIT):
            m2, total2, summed2 = nothing(D, COLUMNS)
            m2, total2, summed2 = plain_blocks(
                pages, table, base, tl.minimum(base + SPLIT, stop), position, last, kv_head, num_kv_heads, x, size,
                m2, total2, summed2, BLOCK, PAGE, HEAD_DIM, D, WIDE,
            )  # fmt: skip
            m, total, summed = fold(m, total, summed, m2, total2, summed2)
    has_column = (n // G < rows) & (position >= start)
    store_part(part_sums, part_stats, out_row, part, num_parts, kv_head, num_heads, has_column, m, total, summed,
               G, HEAD_DIM, D, COLUMNS)  # fmt: skip


@triton.jit(do_not_specialize=["num_parts"])
def merge(part_sums, part_stats, rows, out, num_parts, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """out[h] = sum_p 2^(m_p - m) sums_p / sum_p 2^(m_p - m) totals_p,  parts in order, for one row and head.

    4 D + 8 bytes and 2 D operations a part.
    """
    row, head, num_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    q_row, used = tl.load(rows + 2 * row), tl.load(rows + 2 * row + 1)
    d = tl.arange(0, D)
    m = tl.full((D,), float("-inf"), tl.float32)
    total = tl.zeros((D,), tl.float32)
    summed = tl.zeros((D,), tl.float32)
    at = (row.to(tl.int64) * num_heads + head) * num_parts
    for part in range(used):
        m2 = tl.load(part_stats + 2 * (at + part)) + tl.zeros((D,), tl.float32)
        total2 = tl.load(part_stats + 2 * (at + part) + 1)
        summed2 = tl.load(part_sums + (at + part) * HEAD_DIM + d, d < HEAD_DIM, other=0)
        m, total, summed = fold(m, total, summed, m2, total2, summed2)
    to = (q_row.to(tl.int64) * num_heads + head) * HEAD_DIM + d
    tl.store(out + to, (summed / total).to(out.dtype.element_ty), d < HEAD_DIM)


@triton.jit(do_not_specialize=["num_parts"])
def combine(part_sums, part_stats, rows, out, num_parts, HEAD_DIM: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr):
    """What `merge` computes, PARTS parts at once: one by one they would be waited for one by one."""
    row, head, num_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    q_row, used = tl.load(rows + 2 * row), tl.load(rows + 2 * row + 1)
    d = tl.arange(0, D)
    m = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    summed = tl.zeros((1, D), tl.float32)
    at = (row.to(tl.int64) * num_heads + head) * num_parts
    for first in range(0, used, PARTS):
        part = first + tl.arange(0, PARTS)
        m2 = tl.load(part_stats + 2 * (at + part), part < used, other=float("-inf"))
        total2 = tl.load(part_stats + 2 * (at + part) + 1, part < used, other=0)
        inside = (part < used)[:, None] & (d < HEAD_DIM)[None, :]
        summed2 = tl.load(part_sums + (at + part)[:, None] * HEAD_DIM + d[None, :], inside, other=0)
        highest = tl.maximum(m, tl.max(m2, 0, keep_dims=True))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        shrink, weights = tl.exp2(m - base), tl.exp2(m2 - base)
        total = total * shrink + tl.sum(total2 * weights, 0, keep_dims=True)
        summed = summed * shrink[:, None] + tl.sum(summed2 * weights[:, None], 0, keep_dims=True)
        m = highest
    to = (q_row.to(tl.int64) * num_heads + head) * HEAD_DIM + d
    tl.store(out + to[None, :], (summed / total[:, None]).to(out.dtype.element_ty), (d < HEAD_DIM)[None, :])


@triton.jit
def store(
    k, v, slots, pages, num_kv_heads,
    PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Key and value of one token and kv head, saturated and rounded to float16, to their page; a slot below 0 is none.

    4 D bytes and the input's.
    """
    token, kv_head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + token)  # int64
    d = tl.arange(0, D)
    inside = d < HEAD_DIM
    at = (token.to(tl.int64) * num_kv_heads + kv_head) * HEAD_DIM + d
    if slot >= 0:
        head = (slot // PAGE * 2 * num_kv_heads + kv_head) * (PAGE * HEAD_DIM)
        key = saturate(tl.load(k + at, inside, other=0).to(tl.float32), LIMIT)
        value = saturate(tl.load(v + at, inside, other=0).to(tl.float32), LIMIT)
        tl.store(pages + head + d * PAGE + slot % PAGE, key.to(tl.float16), inside)
        head += num_kv_heads * (PAGE * HEAD_DIM)
        tl.store(pages + head + slot % PAGE * HEAD_DIM + d, value.to(tl.float16), inside)


@triton.jit
def saturate(x, LIMIT: tl.constexpr):
    """x within +-LIMIT; a NaN stays, which a minimum would drop unless it is asked not to."""
    return tl.clamp(x, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
