"""The Triton kernels for matrices of codes; kernels/gpu/packing.py says how they lie.

Weights are read once a program and marked evict-first: no other program wants them, while all want the activations.
Codes become floats by the mantissa of 2^23: 0x4B000000 | code is the float 2^23 + code, and one subtraction, which is
exact, leaves code - center. The instruction that converts integers runs at a fraction of that rate.
"""

import triton
import triton.language as tl


@triton.jit
def values(words, table, j, BITS: tl.constexpr, CENTER: tl.constexpr, MEANING: tl.constexpr):
    """What the codes of plane j mean, before scaling: float32 of the shape of `words`. 3 operations an element."""
    code = (words >> (j * BITS)) & ((1 << BITS) - 1)
    if MEANING == 1:  # E2M1, s eem: as the exponent and the highest fraction bit of a float32, 2^126 too small
        bits = ((code & 8) << 28) | ((code & 7) << 22)
        return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37
    if MEANING == 2:
        return tl.load(table + code, eviction_policy="evict_last").to(tl.float32)
    return (code | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + CENTER)


@triton.jit
def shifts(zeros, offsets, scale, at, mask, CENTER: tl.constexpr, SHIFT: tl.constexpr):
    """What is added to every scaled weight of a group, float32 of the shape of `scale`; SHIFT is 1 or 2."""
    if SHIFT == 1:
        return scale * (CENTER - tl.load(zeros + at, mask, other=0).to(tl.float32))
    return tl.load(offsets + at, mask, other=0).to(tl.float32)


@triton.jit(do_not_specialize=["num_tokens", "blocks_per_split"])
def gemv(
    x, words, scales, zeros, offsets, table, out,
    num_tokens, in_features, out_features, num_blocks, num_groups, blocks_per_split, factor,
    GROUP: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr, PLANE: tl.constexpr, RUN: tl.constexpr,
    CENTER: tl.constexpr, MEANING: tl.constexpr, SHIFT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y[p, t, n] = f sum_{runs r in p} (s[n, r] sum_{k in r} x[t, k] v[n, k] + o[n, r] sum_{k in r} x[t, k])

    in float32, for up to BLOCK_M rows t; p are the parts of the channels, r runs of RUN planes inside a group. The sums
    go word by word, and over the PLANE words at the end.

    Reads the matrix once; 3 N K operations to unpack, T N K to multiply and add.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    t = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    i = tl.arange(0, PLANE)
    split = tl.program_id(2)
    has_row = n < out_features
    row = words + n.to(tl.int64) * (num_blocks * PLANE)
    total = tl.zeros((BLOCK_M, BLOCK_N, PLANE), tl.float32)
    for block in range(split * blocks_per_split, tl.minimum((split + 1) * blocks_per_split, num_blocks)):
        at = row[:, None] + block * PLANE + i[None, :]
        word = tl.load(at, has_row[:, None], other=0, eviction_policy="evict_first")  # [BLOCK_N, PLANE]
        for first in tl.static_range(0, PLANES, RUN):
            part = tl.zeros((BLOCK_M, BLOCK_N, PLANE), tl.float32)
            sums = tl.zeros((BLOCK_M, PLANE), tl.float32)
            for j in tl.static_range(first, first + RUN):
                k = (block * PLANES + j) * PLANE + i
                inside = (t < num_tokens)[:, None] & (k < in_features)[None, :]
                xs = tl.load(x + t[:, None] * in_features + k[None, :], inside, other=0, eviction_policy="evict_last")
                xs = xs.to(tl.float32)
                part += values(word, table, j, BITS, CENTER, MEANING)[None, :, :] * xs[:, None, :]
                if SHIFT != 0:
                    sums += xs
            group = tl.minimum((block * PLANES + first) * PLANE // GROUP, num_groups - 1)
            scale = tl.load(scales + group * out_features + n, has_row, other=0).to(tl.float32)
            total += part * scale[None, :, None]
            if SHIFT != 0:
                shift = shifts(zeros, offsets, scale, group * out_features + n, has_row, CENTER, SHIFT)
                total += sums[:, None, :] * shift[None, :, None]
    y = tl.sum(total, 2) * factor  # [BLOCK_M, BLOCK_N]
    to = (split * num_tokens + t[:, None]).to(tl.int64) * out_features + n[None, :]
    tl.store(out + to, y.to(out.dtype.element_ty), (t < num_tokens)[:, None] & has_row[None, :])


@triton.jit(do_not_specialize=["num_tokens", "blocks_per_split"])
def split(
    x, words, scales, zeros, offsets, table, out,
    num_tokens, in_features, out_features, num_blocks, num_groups, blocks_per_split, factor,
    GROUP: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr, PLANE: tl.constexpr, RUN: tl.constexpr,
    CENTER: tl.constexpr, MEANING: tl.constexpr, SHIFT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The formula of `gemv`, the products of a run on tensor cores: bfloat16 values and activations, summed in
    float32. Codes are exact in bfloat16 and scales come after, so only the entries of LOOKUP tables are rounded.

    Weights stand on the left: their N fills the tile, where a few tokens could not. Reads the matrix once for each
    BLOCK_M tokens; 4 N K operations to unpack, 2 T N K on tensor cores, T N K / (RUN PLANE) to scale.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    t = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    i = tl.arange(0, PLANE)
    part_of_k = tl.program_id(2)
    has_row = n < out_features
    row = words + n.to(tl.int64) * (num_blocks * PLANE)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(part_of_k * blocks_per_split, tl.minimum((part_of_k + 1) * blocks_per_split, num_blocks)):
        at = row[:, None] + block * PLANE + i[None, :]
        word = tl.load(at, has_row[:, None], other=0, eviction_policy="evict_first")  # [BLOCK_N, PLANE]
        for first in tl.static_range(0, PLANES, RUN):
            part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            sums = tl.zeros((PLANE, BLOCK_M), tl.float32)
            for j in tl.static_range(first, first + RUN):
                k = (block * PLANES + j) * PLANE + i
                inside = (k < in_features)[:, None] & (t < num_tokens)[None, :]
                xs = tl.load(x + k[:, None] + t[None, :] * in_features, inside, other=0, eviction_policy="evict_last")
                part = tl.dot(values(word, table, j, BITS, CENTER, MEANING).to(xs.dtype), xs, part)
                if SHIFT != 0:
                    sums += xs.to(tl.float32)
            group = tl.minimum((block * PLANES + first) * PLANE // GROUP, num_groups - 1)
            scale = tl.load(scales + group * out_features + n, has_row, other=0).to(tl.float32)
            total += part * scale[:, None]
            if SHIFT != 0:
                shift = shifts(zeros, offsets, scale, group * out_features + n, has_row, CENTER, SHIFT)
                total += tl.sum(sums, 0)[None, :] * shift[:, None]
    to = (part_of_k * num_tokens + t[None, :]).to(tl.int64) * out_features + n[:, None]
    tl.store(out + to, (total * factor).to(out.dtype.element_ty), has_row[:, None] & (t < num_tokens)[None, :])


@triton.jit(do_not_specialize=["num_tokens", "blocks_per_split"])
def tile(
    x, words, scales, zeros, offsets, table, out,
    num_tokens, in_features, out_features, num_blocks, num_groups, blocks_per_split, factor,
    GROUP: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr, PLANE: tl.constexpr, RUN: tl.constexpr,
    CENTER: tl.constexpr, MEANING: tl.constexpr, SHIFT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y[t, n] = f sum_k x[t, k] bf16(s[n, g] v[n, k] + o[n, g]),  summed in float32 on tensor cores

    With many rows, scaling sums costs more than scaling weights, which are rounded to bfloat16 for it. Reads the matrix
    once for each BLOCK_M tokens; 6 N K operations to unpack and scale for each, 2 T N K on tensor cores.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    t = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    i = tl.arange(0, PLANE)
    has_row = n < out_features
    row = words + n.to(tl.int64) * (num_blocks * PLANE)
    column = t.to(tl.int64) * in_features
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(num_blocks):
        word = tl.load(row[:, None] + block * PLANE + i[None, :], has_row[:, None], other=0)  # [BLOCK_N, PLANE]
        for first in tl.static_range(0, PLANES, RUN):
            group = tl.minimum((block * PLANES + first) * PLANE // GROUP, num_groups - 1)
            scale = tl.load(scales + group * out_features + n, has_row, other=0).to(tl.float32)
            if SHIFT != 0:
                shift = shifts(zeros, offsets, scale, group * out_features + n, has_row, CENTER, SHIFT)
            for j in tl.static_range(first, first + RUN):
                k = (block * PLANES + j) * PLANE + i
                inside = (k < in_features)[:, None] & (t < num_tokens)[None, :]
                xs = tl.load(x + k[:, None] + column[None, :], inside, other=0)
                weight = values(word, table, j, BITS, CENTER, MEANING) * scale[:, None]
                if SHIFT != 0:
                    weight += shift[:, None]
                total = tl.dot(weight.to(xs.dtype), xs, total)
    to = t[None, :].to(tl.int64) * out_features + n[:, None]
    tl.store(out + to, (total * factor).to(out.dtype.element_ty), has_row[:, None] & (t < num_tokens)[None, :])


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
