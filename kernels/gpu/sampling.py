"""Draws from rows of logits in Triton: the definition is kernels/sampling/reference.py; this is how a row is cut up.

A row is cut into *pieces* of PIECE ids. `largest` and `weigh` run a program for each piece of each draw, `pick` one for
each draw, which puts the results of its pieces together.

Where a filter is set it needs ids in order, of which it sorts as few as it can: `weigh` also counts ids by *bucket* of
weights, and those counts bound the mass of any tail from above. What lies in the buckets that may be kept, the
*candidates*, is gathered and sorted. More of them than ROOM are left to the CPU.

All but logits is float64 or integer: weights are what the reference computes but for the exponential's last bits, and
sums differ from its sums by their order. There are no atomics, and a draw's result depends on its row and rules alone.

A draw is FIELDS numbers, float64: row of logits, temperature (0 takes the largest), top_k (0 keeps all; at most the
vocabulary), top_p, min_p, uniform, place among the ids.
"""

import triton
import triton.language as tl

FIELDS = tl.constexpr(7)
# Four buckets to a factor e of a weight, and 16 factors to a bucket beyond e^-NEAR, where no more than a rank matters.
STEPS = tl.constexpr(4.0)
NEAR = tl.constexpr(24.0)
FAR = tl.constexpr(1 / 16)


@triton.jit
def rules_of(draws, draw):
    """temperature, top_k, top_p, min_p, and whether a filter is set."""
    at = draws + draw * FIELDS
    top_k, top_p, min_p = tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)
    return tl.load(at + 1), top_k, top_p, min_p, (top_k > 0) | (top_p < 1) | (min_p > 0)


@triton.jit
def row_of(draws, draw, vocab):
    """Where the draw's logits begin."""
    return tl.load(draws + draw * FIELDS).to(tl.int64) * vocab


@triton.jit
def scaled(x, highest, temperature):
    """(logit - highest) / temperature: at most 0, -inf where the quotient overflows. float64."""
    return (x.to(tl.float64) - highest.to(tl.float64)) / temperature


@triton.jit
def weight(exponent):
    return tl.where(exponent < -700.0, 0.0, tl.exp(exponent))


@triton.jit
def bucket(exponent, BUCKETS: tl.constexpr):
    """Rises as weights fall, the last one open; products are exact. int32, in range for rows that are broken too."""
    near, far = exponent * -STEPS, exponent * -FAR + NEAR * (STEPS - FAR)
    return tl.maximum(tl.minimum(tl.minimum(near, far), BUCKETS - 1.0), 0.0).to(tl.int32)


@triton.jit
def sort_key(x, i):
    """int64 that ascends with falling logit, then rising id."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0 and 0 are equal
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ((~ascending).to(tl.int64) << 32) | i.to(tl.int64)


@triton.jit
def logit_of(key):
    ascending = ~(key >> 32).to(tl.int32)
    return (ascending ^ ((ascending >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def last_of(x, size, BLOCK: tl.constexpr):
    """x[size - 1]; 0 where size is 0."""
    return tl.sum(tl.where(tl.arange(0, BLOCK) == size - 1, x, 0), 0)


@triton.jit
def invert(running, weights, target, BLOCK: tl.constexpr):
    """The first index whose running sum exceeds `target` and that has a weight; the last with one where rounding leaves
    none, BLOCK where there is none at all."""
    i = tl.arange(0, BLOCK)
    first = tl.min(tl.where((running > target) & (weights > 0), i, BLOCK), 0)
    last = tl.max(tl.where(weights > 0, i, 0), 0)
    return tl.where(first < BLOCK, first, last)


@triton.jit
def largest(logits, draws, best, first, vocab, PIECE: tl.constexpr):
    """best = max_i x[i], NaN if one is;  first = the lowest i with x[i] = best.

    Reads 4 bytes and compares 3 times an id; writes 8 bytes a piece.
    """
    piece, draw = tl.program_id(0), tl.program_id(1)
    i = piece * PIECE + tl.arange(0, PIECE)
    x = tl.load(logits + row_of(draws, draw, vocab) + i, i < vocab, other=float("-inf"))
    highest = tl.max(x, 0)
    is_broken = tl.max((x != x).to(tl.int32), 0) > 0
    to = draw * tl.num_programs(0) + piece
    tl.store(first + to, tl.min(tl.where(x == highest, i, vocab), 0))
    tl.store(best + to, tl.where(is_broken, float("nan"), highest))


@triton.jit
def weigh(
    logits, draws, best, sums, counts, vocab,
    PIECE: tl.constexpr, PIECES: tl.constexpr, BUCKETS: tl.constexpr,
):  # fmt: skip
    """sum = sum_i w[i],  w[i] = exp((x[i] - max x) / temperature);  counts[b] = how many i have bucket(w[i]) = b

    over one piece, counts only where a filter is set, nothing for a draw that takes the largest. Reads 4 bytes an id,
    for 36 operations in float64; writes 8 bytes, and 4 a bucket.
    """
    piece, draw, num_pieces = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    temperature, _, _, _, has_filter = rules_of(draws, draw)
    if temperature > 0:
        p = tl.arange(0, PIECES)
        highest = tl.max(tl.load(best + draw * num_pieces + p, p < num_pieces, other=float("-inf")), 0)
        i = piece * PIECE + tl.arange(0, PIECE)
        x = tl.load(logits + row_of(draws, draw, vocab) + i, i < vocab, other=float("-inf"))
        exponent = scaled(x, highest, temperature)
        to = draw * num_pieces + piece
        tl.store(sums + to, tl.sum(weight(exponent), 0))
        if has_filter:
            found = tl.histogram(bucket(exponent, BUCKETS), BUCKETS, mask=i < vocab)
            tl.store(counts + to * BUCKETS + tl.arange(0, BUCKETS), found)


@triton.jit
def from_all(logits, sums, highest, temperature, uniform, vocab, PIECE: tl.constexpr, PIECES: tl.constexpr):
    """The first id whose cumulative weight, by rising id, exceeds `uniform` of the whole. logits: of the row."""
    p = tl.arange(0, PIECES)
    num_pieces = tl.cdiv(vocab, PIECE)
    parts = tl.load(sums + p, p < num_pieces, other=0)
    running = tl.cumsum(parts, 0)
    target = uniform * last_of(running, num_pieces, PIECES)
    piece = invert(running, parts, target, PIECES)
    before = last_of(running, piece, PIECES)
    i = piece * PIECE + tl.arange(0, PIECE)
    x = tl.load(logits + i, i < vocab, other=float("-inf"))
    weights = weight(scaled(x, highest, temperature))
    return piece * PIECE + invert(before + tl.cumsum(weights, 0), weights, target, PIECE)


@triton.jit
def last_bucket(counts, total, top_k, top_p, min_p, vocab, BUCKETS: tl.constexpr):
    """The last bucket that can hold an id which the filters keep, or one that top_p's share is a share of.

    An id that top_p keeps has (1 - top_p) of the whole in itself and what comes after it, so its bucket and those after
    it weigh as much; `ceiling` is at least what an id of a bucket weighs. 2^-32 is more than sums over 2^20 ids round.
    """
    b = tl.arange(0, BUCKETS)
    near, far = b.to(tl.float64) / STEPS, (b.to(tl.float64) - NEAR * (STEPS - FAR)) / FAR
    ceiling = tl.exp(-tl.maximum(near, far)) * (1 + 2.0**-30)
    last = BUCKETS - 1
    if (top_k > 0) & (top_k < vocab):
        last = tl.min(tl.where(tl.cumsum(counts, 0) >= top_k, b, BUCKETS - 1), 0)
    else:
        if top_p < 1:
            tail = tl.cumsum(counts * ceiling, 0, reverse=True)
            last = tl.max(tl.where(tail >= (1 - top_p - 2.0**-32) * total, b, 0), 0)
        last = tl.minimum(last, tl.max(tl.where(ceiling >= min_p, b, 0), 0))
    return last


@triton.jit
def gather(logits, room, highest, temperature, last, sizes, vocab,
           PIECE: tl.constexpr, PIECES: tl.constexpr, BUCKETS: tl.constexpr):  # fmt: skip
    """Sort keys of the ids up to bucket `last` to `room`, by rising id. sizes [PIECES]: how many a piece has."""
    size = 0
    for piece in range(tl.cdiv(vocab, PIECE)):
        here = last_of(sizes, piece + 1, PIECES)
        if here > 0:
            i = piece * PIECE + tl.arange(0, PIECE)
            x = tl.load(logits + i, i < vocab, other=float("-inf"))
            is_here = (bucket(scaled(x, highest, temperature), BUCKETS) <= last) & (i < vocab)
            tl.store(room + size + tl.cumsum(is_here.to(tl.int32), 0) - 1, sort_key(x, i), is_here)
        size += here


@triton.jit
def from_candidates(room, size, total, highest, temperature, top_k, top_p, min_p, uniform, vocab, ROOM: tl.constexpr):
    """The reference's draw from sorted ids, which stay in the room; total: what all ids weigh, of which `size` are
    there."""
    rank = tl.arange(0, ROOM)
    keys = tl.sort(tl.load(room + rank, rank < size, other=0x7FFFFFFFFFFFFFFF))
    tl.store(room + rank, keys)
    weights = tl.where(rank < size, weight(scaled(logit_of(keys), highest, temperature)), 0.0)
    if (top_k > 0) & (top_k < vocab):
        weights = tl.where(rank < top_k, weights, 0.0)
        total = tl.sum(weights, 0)
    kept = ROOM
    if top_p < 1:
        before = tl.cumsum(weights, 0) - weights
        kept = tl.maximum(tl.min(tl.where(before < top_p * total, ROOM, rank), 0), 1)
    weights = tl.where((rank < kept) & (weights >= min_p), weights, 0.0)
    running = tl.cumsum(weights, 0)
    index = invert(running, weights, uniform * last_of(running, ROOM, ROOM), ROOM)
    return tl.sum(tl.where(rank == index, keys & 0xFFFFFFFF, 0), 0).to(tl.int32)


@triton.jit
def pick(
    logits, draws, best, first, sums, counts, rooms, ids, vocab,
    PIECE: tl.constexpr, PIECES: tl.constexpr, BUCKETS: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """The id of one draw, from the results of its pieces; -1 where a logit is NaN or the largest is not finite, and
    where there are more candidates than ROOM.

    Reads 12 bytes a piece and, for a draw without filters, a piece of 4 PIECE bytes; with filters 4 bytes a piece and
    bucket, and the row's pieces with candidates. Sorts ROOM keys of 8 bytes, each in log2(ROOM) (log2(ROOM) + 1) / 2
    steps.
    """
    draw = tl.program_id(0)
    num_pieces = tl.cdiv(vocab, PIECE)
    temperature, top_k, top_p, min_p, has_filter = rules_of(draws, draw)
    uniform = tl.load(draws + draw * FIELDS + 5)
    p, at = tl.arange(0, PIECES), draw * num_pieces
    maxima = tl.load(best + at + p, p < num_pieces, other=float("-inf"))
    highest = tl.max(maxima, 0)
    is_broken = (tl.max((maxima != maxima).to(tl.int32), 0) > 0) | (tl.abs(highest) == float("inf"))
    logits += row_of(draws, draw, vocab)
    found = -1
    if is_broken == 0:
        if temperature == 0:
            firsts = tl.load(first + at + p, p < num_pieces, other=0)
            found = tl.min(tl.where(maxima == highest, firsts, vocab), 0)
        elif has_filter == 0:
            found = from_all(logits, sums + at, highest, temperature, uniform, vocab, PIECE, PIECES)
        else:
            b = tl.arange(0, BUCKETS)
            table = tl.load(counts + (at + p)[:, None] * BUCKETS + b[None, :], (p < num_pieces)[:, None], other=0)
            total = tl.sum(tl.load(sums + at + p, p < num_pieces, other=0), 0)
            last = last_bucket(tl.sum(table, 0), total, top_k, top_p, min_p, vocab, BUCKETS)
            sizes = tl.sum(tl.where((b <= last)[None, :], table, 0), 1)
            size = tl.sum(sizes, 0)
            if size <= ROOM:
                room = rooms + draw * ROOM
                gather(logits, room, highest, temperature, last, sizes, vocab, PIECE, PIECES, BUCKETS)
                tl.debug_barrier()  # what other threads stored is read
                found = from_candidates(
                    room, size, total, highest, temperature, top_k, top_p, min_p, uniform, vocab, ROOM
                )
    tl.store(ids + tl.load(draws + draw * FIELDS + 6).to(tl.int32), found)
