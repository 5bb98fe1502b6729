"""The Triton kernel for weights that are decoded before they are multiplied: e4m3, vectors of a book, tables of each
group. kernels/gpu/decoding.py says how they lie.

Weights stand on the left of a product, as in kernels/gpu/linear.py. Their scales come after the product, once for each
run of channels that share one: with runs of 128 channels that is one operation for every 16 that tensor cores do in the
same time.
"""

import triton
import triton.language as tl

E4M3, BOOK, TABLES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def e4m3(words, j, V: tl.constexpr):
    """Byte j of each half of words [rows, V / 2] as float32 [rows, V], exactly: sign and 7 bits moved into place are a
    bfloat16 that is 2^120 too small, subnormal numbers too. Written with int16, two of them are multiplied at once."""
    words = words << (8 - 8 * j)
    bits = (words & -0x7FFF8000) | ((words >> 4) & 0x07F007F0)
    both = tl.reshape(tl.join(bits.to(tl.int16), (bits >> 16).to(tl.int16)), (words.shape[0], V))
    return both.to(tl.bfloat16, bitcast=True).to(tl.float32) * 1.329227995784916e36


@triton.jit
def weights_of(
    found, j, book, table,
    KIND: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Weights of one run of channels before scaling, bfloat16 [BLOCK_N, V]. table [BLOCK_N]: where a row's is."""
    if KIND == E4M3:
        weights = e4m3(found, j, V)
    elif KIND == BOOK:  # found: codes [BLOCK_N, V / D]
        at = (found.to(tl.int32) & ((1 << BITS) - 1))[:, :, None] * D + tl.arange(0, D)[None, None, :]
        weights = tl.reshape(tl.load(book + at, eviction_policy="evict_last"), (BLOCK_N, V))
    else:
        mask: tl.constexpr = (1 << BITS) - 1
        entries = tl.join((found >> (j * BITS)) & mask, (found >> (j * BITS + 16)) & mask)
        at = table[:, None] + tl.reshape(entries, (BLOCK_N, V))
        weights = tl.load(book + at, eviction_policy="evict_last")
    return weights.to(tl.bfloat16)


@triton.jit(do_not_specialize=["num_tokens", "blocks_per_split"])
def multiply(
    x, codes, book, scales, out,
    num_tokens, in_features, out_features, num_blocks, num_groups, blocks_per_split, rows_per_scale, num_row_blocks,
    KIND: tl.constexpr, BITS: tl.constexpr, ENTRIES: tl.constexpr, D: tl.constexpr, PLANES: tl.constexpr,
    V: tl.constexpr, WIDTH: tl.constexpr, RUN: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y[p, t, n] = sum_{j in p} s[n, j] sum_{k in j} x[t, k] w[n, k]

    p are the parts of the channels, j runs of RUN planes of V channels, or all of p where a row has one scale or none.
    Weights and activations are bfloat16, sums float32.

    Reads codes and scales once for each BLOCK_M tokens; N K operations to look weights up, or 3 N K to decode e4m3;
    2 T N K on tensor cores, 2 T N K / (RUN V) to scale. A vector of a book is read from where the book lies in a cache.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    t = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    part_of_k = tl.program_id(2)
    row, token = tl.minimum(n, out_features - 1), tl.minimum(t, num_tokens - 1)
    at = codes + row.to(tl.int64)[:, None] * (num_blocks * WIDTH) + tl.arange(0, WIDTH)[None, :]
    scales += row // rows_per_scale
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first = part_of_k * blocks_per_split
    for block in range(first, tl.minimum(first + blocks_per_split, num_blocks)):
        found = tl.load(at + block * WIDTH)  # [BLOCK_N, WIDTH]
        for start in tl.static_range(0, PLANES, RUN):
            group = tl.minimum((block * PLANES + start) * V // GROUP, num_groups - 1)
            part = total
            if not WHOLE:
                part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for j in tl.static_range(start, start + RUN):
                k = (block * PLANES + j) * V + tl.arange(0, V)
                xs_at = x + k[:, None] + token.to(tl.int64)[None, :] * in_features
                if EVEN:
                    xs = tl.load(xs_at, eviction_policy="evict_last")
                else:
                    xs = tl.load(xs_at, (k < in_features)[:, None], other=0, eviction_policy="evict_last")
                table = (row * num_groups + group).to(tl.int64) * ENTRIES
                part = tl.dot(weights_of(found, j, book, table, KIND, BITS, D, V, BLOCK_N), xs, part)
            if WHOLE:
                total = part
            else:
                total += part * tl.load(scales + group * num_row_blocks).to(tl.float32)[:, None]
    if WHOLE:
        total *= tl.load(scales).to(tl.float32)[:, None]
    to = (part_of_k * num_tokens + t[None, :]).to(tl.int64) * out_features + n[:, None]
    tl.store(out + to, total.to(out.dtype.element_ty), (n < out_features)[:, None] & (t < num_tokens)[None, :])
