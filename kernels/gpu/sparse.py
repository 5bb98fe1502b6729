"""The Triton kernel for rows of few values, each with its column."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_tokens"])
def multiply(
    x, starts, columns, values, out, num_tokens, out_features,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y[t, n] = sum_i x[column[i], t] value[i],   starts[n] <= i < starts[n + 1],   CHUNK at a time, in order, float32

    x [K, num_tokens] stands channel by channel, so that the tokens of a column lie side by side. Reads 6 or 8 bytes an
    entry once for each BLOCK_M tokens, and 2 T of activations, which stay in a cache; 2 T operations an entry.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    t = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row, token = tl.minimum(n, out_features - 1), tl.minimum(t, num_tokens - 1)
    first = tl.load(starts + row)
    count = tl.load(starts + row + 1) - first
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, tl.max(count, 0), CHUNK):
        i = start + tl.arange(0, CHUNK)
        at, inside = first[:, None] + i[None, :], i[None, :] < count[:, None]  # [BLOCK_N, CHUNK]
        column = tl.load(columns + at, inside, other=0).to(tl.int64)
        value = tl.load(values + at, inside, other=0).to(tl.float32)
        xs_at = x + (column * num_tokens)[:, :, None] + token[None, None, :]
        xs = tl.load(xs_at, inside[:, :, None], other=0).to(tl.float32)  # [BLOCK_N, CHUNK, BLOCK_M]
        total += tl.sum(xs * value[:, :, None], 1)
    to = t.to(tl.int64)[None, :] * out_features + n[:, None]
    tl.store(out + to, total.to(out.dtype.element_ty), (n < out_features)[:, None] & (t < num_tokens)[None, :])
