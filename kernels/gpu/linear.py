"""The Triton kernels for matrices of codes; kernels/gpu/packing.py says how they lie.

What decides how fast they are is how many instructions a weight takes (benchmarks/gpu_instructions.py counts them): an
H200 has 3.7 for each weight of 4.25 bits in the time that it takes to read it, and 1.9 at 2.25 bits. Hence

- products are left to tensor cores for a single token too: one that multiplied for itself would spend two
  instructions a weight on it, and one on every activation;
- codes become floats by no arithmetic: 0x4300 | code is the bfloat16 128 + code, for two codes at once. What that adds
  is taken off again together with the zero point, once for each group: shift * sum_k x[t, k];
- the sum of a group's activations is a product with ones, on tensor cores as well.

Weights stand on the left of a product, where their rows fill the tile and a few tokens could not. They are read once a
program and marked evict-first: no other program wants them, while all want the activations.
"""

import triton
import triton.language as tl


@triton.jit
def value(code, table, BASE: tl.constexpr, MEANING: tl.constexpr):
    """What codes mean, one to an int32, before scaling: bfloat16 of the same shape."""
    if MEANING == 1:  # E2M1, s eem: as the exponent and the highest fraction bit of a float32, 2^126 too small
        bits = ((code & 8) << 28) | ((code & 7) << 22)
        found = bits.to(tl.float32, bitcast=True) * 8.507059173023462e37
    elif MEANING == 2:
        found = tl.load(table + code, eviction_policy="evict_last")
    else:  # 0x4B000000 | code is the float 2^23 + code; the subtraction is exact
        found = (code | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + BASE)
    return found.to(tl.bfloat16)


@triton.jit
def values(words, table, j, BITS: tl.constexpr, BASE: tl.constexpr, MEANING: tl.constexpr, PLANE: tl.constexpr):
    """Plane j of words [rows, PLANE / 2] before scaling: bfloat16 [rows, PLANE]."""
    MASK: tl.constexpr = (1 << BITS) - 1
    if MEANING == 0 and BITS < 8:
        both = ((words >> (j * BITS)) & (MASK * 0x10001)) | 0x43004300
        low, high = both.to(tl.int16), (both >> 16).to(tl.int16)
        low, high = low.to(tl.bfloat16, bitcast=True), high.to(tl.bfloat16, bitcast=True)
    else:
        low = value((words >> (j * BITS)) & MASK, table, BASE, MEANING)
        high = value((words >> (j * BITS + 16)) & MASK, table, BASE, MEANING)
    return tl.reshape(tl.join(low, high), (words.shape[0], PLANE))


@triton.jit
def parameter(counts, steps, group, n, out_features, STEP: tl.constexpr):
    """Row `group` of scales or offsets [num_groups, N], float32; with STEP they count the steps of so many groups."""
    found = tl.load(counts + group * out_features + n).to(tl.float32)
    if STEP != 0:
        found *= tl.load(steps + group // STEP * out_features + n).to(tl.float32)
    return found


@triton.jit
def shift_of(
    scale, zeros, offsets, offset_steps, group, n, out_features,
    BASE: tl.constexpr, CENTER: tl.constexpr, SHIFT: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """What is added to every scaled weight of a group, float32 of the shape of `scale`."""
    if SHIFT == 1:
        return scale * (BASE - tl.load(zeros + group * out_features + n).to(tl.float32))
    found = scale * (1.0 * (BASE - CENTER))
    if SHIFT == 2:
        found += parameter(offsets, offset_steps, group, n, out_features, STEP)
    return found


@triton.jit
def activations(x, t, k, in_features, EVEN: tl.constexpr):
    """x[t, k] as [channels, tokens], zeros beyond the last channel."""
    at = x + k[:, None] + t.to(tl.int64)[None, :] * in_features
    if EVEN:
        return tl.load(at, eviction_policy="evict_last")
    return tl.load(at, (k < in_features)[:, None], other=0, eviction_policy="evict_last")


@triton.jit(do_not_specialize=["num_tokens", "blocks_per_split"])
def few(
    x, words, scales, zeros, offsets, scale_steps, offset_steps, table, out,
    num_tokens, in_features, out_features, num_blocks, num_groups, blocks_per_split, factor,
    GROUP: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr, PLANE: tl.constexpr, RUN: tl.constexpr,
    BASE: tl.constexpr, CENTER: tl.constexpr, MEANING: tl.constexpr, SHIFT: tl.constexpr, STEP: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y[p, t, n] = f sum_{runs r in p} (s[n, r] sum_{k in r} x[t, k] v[n, k] + o[n, r] sum_{k in r} x[t, k])

    p are the parts of the channels, r runs of RUN planes inside a group. Values and activations are bfloat16, products
    of a run are summed on tensor cores, runs in order, both in float32. Nothing is rounded but entries of tables.

    Reads the matrix once for each BLOCK_M tokens; 1 N K operations to unpack, 2 T N K on tensor cores and as many for
    the sums of activations, 2 T N K / (RUN PLANE) to scale.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    t = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    part_of_k = tl.program_id(2)
    row, token = tl.minimum(n, out_features - 1), tl.minimum(t, num_tokens - 1)
    at = words + row.to(tl.int64)[:, None] * (num_blocks * (PLANE // 2)) + tl.arange(0, PLANE // 2)[None, :]
    ones = tl.full((BLOCK_N, PLANE), 1.0, tl.float32).to(tl.bfloat16)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(part_of_k * blocks_per_split, tl.minimum((part_of_k + 1) * blocks_per_split, num_blocks)):
        word = tl.load(at + block * (PLANE // 2), eviction_policy="evict_first")  # [BLOCK_N, PLANE / 2]
        for first in tl.static_range(0, PLANES, RUN):
            part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for j in tl.static_range(first, first + RUN):
                k = (block * PLANES + j) * PLANE + tl.arange(0, PLANE)
                xs = activations(x, token, k, in_features, EVEN)
                part = tl.dot(values(word, table, j, BITS, BASE, MEANING, PLANE), xs, part)
                if SHIFT != 0:
                    sums = tl.dot(ones, xs, sums)
            group = tl.minimum((block * PLANES + first) * PLANE // GROUP, num_groups - 1)
            scale = parameter(scales, scale_steps, group, row, out_features, STEP)
            total += part * scale[:, None]
            if SHIFT != 0:
                shift = shift_of(
                    scale, zeros, offsets, offset_steps, group, row, out_features, BASE, CENTER, SHIFT, STEP
                )
                total += sums * shift[:, None]
    to = (part_of_k * num_tokens + t[None, :]).to(tl.int64) * out_features + n[:, None]
    tl.store(
        out + to, (total * factor).to(out.dtype.element_ty), (n < out_features)[:, None] & (t < num_tokens)[None, :]
    )


@triton.jit(do_not_specialize=["num_tokens", "blocks_per_split"])
def many(
    x, words, scales, zeros, offsets, scale_steps, offset_steps, table, out,
    num_tokens, in_features, out_features, num_blocks, num_groups, blocks_per_split, factor,
    GROUP: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr, PLANE: tl.constexpr, RUN: tl.constexpr,
    BASE: tl.constexpr, CENTER: tl.constexpr, MEANING: tl.constexpr, SHIFT: tl.constexpr, STEP: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y[p, t, n] = f sum_{k in p} x[t, k] bf16(s[n, g] v[n, k] + o[n, g]),  summed in float32 on tensor cores

    With many rows, scaling sums costs more than scaling weights, which are rounded to bfloat16 for it. Reads the matrix
    once for each BLOCK_M tokens; 4 N K operations to unpack and scale for each, 2 T N K on tensor cores.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    t = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    part_of_k = tl.program_id(2)
    row, token = tl.minimum(n, out_features - 1), tl.minimum(t, num_tokens - 1)
    at = words + row.to(tl.int64)[:, None] * (num_blocks * (PLANE // 2)) + tl.arange(0, PLANE // 2)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(part_of_k * blocks_per_split, tl.minimum((part_of_k + 1) * blocks_per_split, num_blocks)):
        word = tl.load(at + block * (PLANE // 2))  # [BLOCK_N, PLANE / 2]
        for first in tl.static_range(0, PLANES, RUN):
            group = tl.minimum((block * PLANES + first) * PLANE // GROUP, num_groups - 1)
            scale = parameter(scales, scale_steps, group, row, out_features, STEP)
            if SHIFT != 0:
                shift = shift_of(
                    scale, zeros, offsets, offset_steps, group, row, out_features, BASE, CENTER, SHIFT, STEP
                )
            for j in tl.static_range(first, first + RUN):
                k = (block * PLANES + j) * PLANE + tl.arange(0, PLANE)
                xs = activations(x, token, k, in_features, EVEN)
                weight = values(word, table, j, BITS, BASE, MEANING, PLANE).to(tl.float32) * scale[:, None]
                if SHIFT != 0:
                    weight += shift[:, None]
                total = tl.dot(weight.to(tl.bfloat16), xs, total)
    to = (part_of_k * num_tokens + t[None, :]).to(tl.int64) * out_features + n[:, None]
    tl.store(
        out + to, (total * factor).to(out.dtype.element_ty), (n < out_features)[:, None] & (t < num_tokens)[None, :]
    )


@triton.jit(do_not_specialize=["num_splits", "count"])
def sum_splits(parts, out, num_splits, count, BLOCK: tl.constexpr):
    """out[i] = sum_p parts[p, i] in order, in float32, rounded once. 4 (P + 1/2) bytes and P operations an element."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    at = parts + i
    for _ in range(num_splits):
        total += tl.load(at, i < count, other=0)
        at += count
    tl.store(out + i, total.to(out.dtype.element_ty), i < count)
