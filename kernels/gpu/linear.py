"""The Triton kernels for matrices of codes; kernels/gpu/packing.py says how they lie.

What decides how fast they are is how many instructions a weight takes (benchmarks/gpu_instructions.py counts them): an
H200 has 3.7 for each weight of 4.25 bits in the time that it takes to read it, and 1.9 at 2.25 bits. Hence

- products are left to tensor cores for a single token too: one that multiplied for itself would spend two
  instructions a weight on it, and one on every activation;
- codes become bfloat16 two at a time, by moving bits: 0x4300 | code is the bfloat16 128 + code. What that adds is taken
  off again together with the zero point, once for each group: shift * sum_k x[t, k];
- the sum of a group's activations is a product with ones, on tensor cores as well;
- what must be done to weights one by one is done in bfloat16, two to an instruction.

Weights stand on the left of a product, where their rows fill the tile and a few tokens could not. They are read once a
program and marked evict-first: no other program wants them, while all want the activations.

Of an int32 that holds two bfloat16 the lower half is the channel that comes first. PTX is written out where the
compiler has no word for an instruction; tests/kernels/ptx.py says what it means to the interpreter.
"""

import triton
import triton.language as tl


@triton.jit
def fused(pairs, by, add):
    """pairs * by + add, rounded once: int32, the bits of one bfloat16 in an int16, int32. Subnormals count."""
    return tl.inline_asm_elementwise(
        "{.reg .b32 by; mov.b32 by, {$2, $2}; fma.rn.bf16x2 $0, $1, by, $3;}",
        "=r,r,h,r", [pairs, by, add], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def times(pairs, by):
    """pairs * by, likewise."""
    return tl.inline_asm_elementwise(
        "{.reg .b32 by, no; mov.b32 by, {$2, $2}; mov.b32 no, 0x80008000; fma.rn.bf16x2 $0, $1, by, no;}",
        "=r,r,h", [pairs, by], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def plus(pairs, add):
    """pairs + add, likewise."""
    return tl.inline_asm_elementwise(
        "{.reg .b32 one, add; mov.b32 one, 0x3F803F80; mov.b32 add, {$2, $2}; fma.rn.bf16x2 $0, $1, one, add;}",
        "=r,r,h", [pairs, add], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def bits_of(x):
    """The bits of bfloat16 numbers."""
    return x.to(tl.bfloat16).to(tl.int16, bitcast=True)


@triton.jit
def entry(table, i):
    """Word i of a table, [1, 1] int32. What is 0 in every lane is added, and the compiler does not know that: what it
    knows to be the same for all lanes it copies into a register at every use, up to an instruction a weight."""
    at = tl.arange(0, 1)[:, None] + tl.arange(0, 1)[None, :] + i
    return tl.inline_asm_elementwise(
        "{.reg .b32 none; mov.u32 none, %lanemask_lt; shr.u32 none, none, 31; or.b32 $0, $1, none;}",
        "=r,r", [tl.load(table + at)], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def entries(table, BITS: tl.constexpr, MEANING: tl.constexpr):
    """What `values` needs beside codes: the words of a table, or the bits that make bfloat16 of codes."""
    if MEANING == 2:
        return (
            entry(table, 0), entry(table, 1), entry(table, 2), entry(table, 3),
            entry(table, 4), entry(table, 5), entry(table, 6), entry(table, 7),
        )  # fmt: skip
    elif MEANING == 0:
        return (entry(table, 0), entry(table, 1))
    else:
        return 0


@triton.jit
def permuted(a, b, order):
    """Four of the eight bytes b:a; where a nibble of `order` is 8 or more, a byte's sign, eight times."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, order], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def looked_up(words, table, j, MIXED: tl.constexpr):
    """Plane j of words of codes of 4 bits, by a table of 16 bfloat16 (kernels/gpu/codes.py): the lower and the upper
    byte of the four codes of a half-word."""
    codes = words >> (j // 2 * 16)
    if MIXED:
        upper = permuted(codes, codes << 4, 0x9D8C)  # whether a code is 8 or more, by bytes
        codes &= 0x7777
        low, other = permuted(table[0], table[1], codes), permuted(table[2], table[3], codes)
        low ^= (low ^ other) & upper
        high, other = permuted(table[4], table[5], codes), permuted(table[6], table[7], codes)
        high ^= (high ^ other) & upper
    else:
        turned = codes ^ -0x77777778  # 8 in every nibble
        low = permuted(table[0], table[1], codes) ^ permuted(table[2], table[3], turned)
        high = permuted(table[4], table[5], codes) ^ permuted(table[6], table[7], turned)
    return permuted(low, high, 0x5140 if j % 2 == 0 else 0x7362)


@triton.jit
def small_floats(words, j):
    """Plane j of E2M1, 2^-126 of what it means: sign, exponent and fraction in the places of a bfloat16's. The bits lie
    so that they are found by eight operations for eight codes (kernels/gpu/packing.py)."""
    if j == 0:
        found = words
    elif j == 1:
        found = words << 6
    elif j == 2:
        found = (words << 12) | (words.to(tl.uint32, bitcast=True) >> 20).to(tl.int32, bitcast=True)
    else:
        found = (words >> 6) ^ (words << 2)
    return found & -0x7E3F7E40  # 0x81C0 in both halves


@triton.jit
def values(words, bits, j, BITS: tl.constexpr, MEANING: tl.constexpr, MIXED: tl.constexpr, EACH: tl.constexpr):
    """Plane j of words [rows, PLANE / 2] before scaling, two bfloat16 to an int32; of E2M1 2^-126 with EACH."""
    if MEANING == 1:
        found = small_floats(words, j)
        if EACH == 0:
            found = times(found, tl.full(words.shape, 0x7E80, tl.int16))  # 2^126
        return found
    elif MEANING == 2:
        return looked_up(words, bits, j, MIXED)
    elif BITS == 8:  # code - 128: the bfloat16 128 + 7 bits, less 128 or, without the eighth bit, 256
        code = words >> (j * BITS)
        top = ((code ^ -1) & 0x800080) | bits[1]
        return fused((code & 0x7F007F) | bits[0], tl.full(words.shape, 0x3F80, tl.int16), top)
    else:
        return ((words >> (j * BITS)) & (((1 << BITS) - 1) * 0x10001)) | bits[0]


@triton.jit
def floats(pairs, PLANE: tl.constexpr):
    """int32 [rows, PLANE / 2] -> bfloat16 [rows, PLANE]."""
    low, high = pairs.to(tl.int16), (pairs >> 16).to(tl.int16)
    low, high = low.to(tl.bfloat16, bitcast=True), high.to(tl.bfloat16, bitcast=True)
    return tl.reshape(tl.join(low, high), (pairs.shape[0], PLANE))


@triton.jit
def scaled(
    pairs, scales, block, j, row, num_blocks, num_groups,
    GROUP: tl.constexpr, PLANES: tl.constexpr, PLANE: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Plane j times its scales, [N, num_groups] bfloat16 of which EACH belong to a plane: exact."""
    if PLANE < GROUP:
        group, width = tl.minimum((block * PLANES + j) * PLANE // GROUP, num_groups - 1), num_groups
    else:  # groups of whole blocks; by their number the compiler knows that EACH lie where one load takes them
        group, width = (block * PLANES + j) * EACH, num_blocks * PLANES * EACH
    at = scales + row.to(tl.int64)[:, None] * width + group + tl.arange(0, EACH)[None, :]
    scale = bits_of(tl.load(at, eviction_policy="evict_first"))[:, :, None]  # [rows, EACH, 1]
    wide = tl.broadcast_to(scale, (pairs.shape[0], EACH, PLANE // 2 // EACH))
    return times(pairs, tl.reshape(wide, (pairs.shape[0], PLANE // 2)))


@triton.jit
def fetched(
    scales, zeros, offsets, scale_steps, offset_steps, block, row, out_features, num_groups,
    GROUP: tl.constexpr, PLANES: tl.constexpr, PLANE: tl.constexpr, RUN: tl.constexpr,
    SHIFT: tl.constexpr, STEP: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Parameters of the runs of a block as they lie, [rows]: (scale, its step, zero or offset, its step) of each, where
    the scale stands for what there is not. None with EACH."""
    found = ()
    for first in tl.static_range(0, PLANES if EACH == 0 else 0, RUN):
        group = tl.minimum((block * PLANES + first) * PLANE // GROUP, num_groups - 1)
        scale = tl.load(scales + group * out_features + row)
        step, shift, shift_step = scale, scale, scale
        if STEP != 0:
            step = tl.load(scale_steps + group // STEP * out_features + row)
        if SHIFT == 4:
            shift = tl.load(offsets + group * out_features + row)
            if STEP != 0:
                shift_step = tl.load(offset_steps + group // STEP * out_features + row)
        elif SHIFT > 1:
            shift = tl.load(zeros + group * out_features + row)
        found += ((scale, step, shift, shift_step),)
    return found


@triton.jit
def counted(counts, steps, STEP: tl.constexpr):
    """Scales or offsets of a run, float32 [rows]; with STEP they count steps."""
    if STEP != 0:
        return counts.to(tl.float32) * steps.to(tl.float32)
    else:
        return counts.to(tl.float32)


@triton.jit
def shift_of(run, BASE: tl.constexpr, CENTER: tl.constexpr, SHIFT: tl.constexpr, STEP: tl.constexpr):
    """(a, c) of what `fetched` gives of a run, float32 [rows]: its weights are s (v + a) + c."""
    none = tl.zeros(run[2].shape, tl.float32)
    if SHIFT == 4:
        return none + (BASE - CENTER), counted(run[2], run[3], STEP)
    elif SHIFT > 1:
        return BASE - run[2].to(tl.float32), none
    else:
        return none + (BASE - CENTER), none


@triton.jit
def activations(x, t, k, in_features, EVEN: tl.constexpr):
    """x[t, k] as [channels, tokens], zeros beyond the last channel."""
    at = x + k[:, None] + t.to(tl.int64)[None, :] * in_features
    if EVEN:
        return tl.load(at, eviction_policy="evict_last")
    return tl.load(at, (k < in_features)[:, None], other=0, eviction_policy="evict_last")


@triton.jit
def matrix_of(n, first_end, second_end, out_features):
    """(first row, number of rows) of that of up to three joined matrices to which row n belongs. A program's rows are
    all of one."""
    start = tl.where(n >= second_end, second_end, tl.where(n >= first_end, first_end, 0))
    end = tl.where(n >= second_end, out_features, tl.where(n >= first_end, second_end, first_end))
    return start, end - start


@triton.jit(do_not_specialize=["num_tokens", "blocks_per_split"])
def few(
    x, words, scales, zeros, offsets, scale_steps, offset_steps, table, out,
    num_tokens, in_features, out_features, num_blocks, num_groups, blocks_per_split, first_end, second_end, factor,
    GROUP: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr, PLANE: tl.constexpr, RUN: tl.constexpr,
    BASE: tl.constexpr, CENTER: tl.constexpr, MEANING: tl.constexpr, MIXED: tl.constexpr, SHIFT: tl.constexpr,
    STEP: tl.constexpr, EACH: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y[p, t, n] = f sum_{runs r in p} (s[n, r] sum_{k in r} x[t, k] v[n, k] + o[n, r] sum_{k in r} x[t, k])

    p are the parts of the channels, r runs of RUN planes inside a group. Values and activations are bfloat16, products
    of a run are summed on tensor cores, runs in order, both in float32. Nothing is rounded but entries of tables. With
    EACH the scaled values are bfloat16 as they are, and are what is multiplied.

    Reads the matrix once for each BLOCK_M tokens; 1 N K operations to unpack, 2 T N K on tensor cores and as many for
    the sums of activations, 2 T N K / (RUN PLANE) to scale.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    t = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    part_of_k = tl.program_id(2)
    row, token = tl.minimum(n, out_features - 1), tl.minimum(t, num_tokens - 1)
    at = words + row.to(tl.int64)[:, None] * (num_blocks * (PLANE // 2)) + tl.arange(0, PLANE // 2)[None, :]
    ones = tl.full((BLOCK_N, PLANE), 1.0, tl.float32).to(tl.bfloat16)
    bits = entries(table, BITS, MEANING)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    now = fetched(
        scales, zeros, offsets, scale_steps, offset_steps, part_of_k * blocks_per_split, row, out_features, num_groups,
        GROUP, PLANES, PLANE, RUN, SHIFT, STEP, EACH,
    )  # fmt: skip
    for block in range(part_of_k * blocks_per_split, tl.minimum((part_of_k + 1) * blocks_per_split, num_blocks)):
        ahead = fetched(  # memory takes as long as the products of a block
            scales, zeros, offsets, scale_steps, offset_steps, block + 1, row, out_features, num_groups,
            GROUP, PLANES, PLANE, RUN, SHIFT, STEP, EACH,
        )  # fmt: skip
        word = tl.load(at + block * (PLANE // 2), eviction_policy="evict_first")  # [BLOCK_N, PLANE / 2]
        for first in tl.static_range(0, PLANES, RUN):
            part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for j in tl.static_range(first, first + RUN):
                k = (block * PLANES + j) * PLANE + tl.arange(0, PLANE)
                xs = activations(x, token, k, in_features, EVEN)
                pairs = values(word, bits, j, BITS, MEANING, MIXED, EACH)
                if EACH != 0:
                    pairs = scaled(pairs, scales, block, j, row, num_blocks, num_groups, GROUP, PLANES, PLANE, EACH)
                    total = tl.dot(floats(pairs, PLANE), xs, total)
                else:
                    part = tl.dot(floats(pairs, PLANE), xs, part)
                if SHIFT != 0:
                    sums = tl.dot(ones, xs, sums)
            if EACH == 0:
                run = now[first // RUN]
                scale = counted(run[0], run[1], STEP)
                total += part * scale[:, None]
                if SHIFT != 0:
                    add, shift = shift_of(run, BASE, CENTER, SHIFT, STEP)
                    total += sums * (scale * add + shift)[:, None]
        now = ahead
    start, width = matrix_of(tl.program_id(0) * BLOCK_N, first_end, second_end, out_features)
    base = part_of_k.to(tl.int64) * num_tokens * out_features + start.to(tl.int64) * num_tokens
    to = base + t.to(tl.int64)[None, :] * width + (n - start)[:, None]
    tl.store(
        out + to, (total * factor).to(out.dtype.element_ty), (n < out_features)[:, None] & (t < num_tokens)[None, :]
    )


@triton.jit
def rounded(
    pairs, scale, add, shift, SHIFT: tl.constexpr, PARTS: tl.constexpr, PLANE: tl.constexpr
):  # fmt: skip
    """bf16((v + a) s + c) of values v, [rows, PLANE].

    In float32 where a is no whole number or there is c. Else in bfloat16, two weights to an instruction: v + a has 8
    bits and is exact; s is taken in two parts, s' = bf16(s) and s'' = bf16(s - s'), which leave 2^-16 of it; and
    (v + a) s' + ((v + a) s'') is rounded as a whole and in its small part. That is 2^-8 (1 + 2^-6) of the weight, where
    rounding it once is 2^-8. Of scales that are bfloat16 there is one part.
    """
    if SHIFT > 2:
        weight = floats(pairs, PLANE).to(tl.float32) * scale[:, None] + (scale * add + shift)[:, None]
        return weight.to(tl.bfloat16)
    else:
        if SHIFT != 0:
            pairs = plus(pairs, bits_of(add)[:, None])
        most = scale.to(tl.bfloat16)
        if PARTS == 1:
            pairs = times(pairs, bits_of(most)[:, None])
        else:
            rest = bits_of(scale - most.to(tl.float32))[:, None]
            pairs = fused(pairs, bits_of(most)[:, None], times(pairs, rest))
        return floats(pairs, PLANE)


@triton.jit(do_not_specialize=["num_tokens", "blocks_per_split"])
def many(
    x, words, scales, zeros, offsets, scale_steps, offset_steps, table, out,
    num_tokens, in_features, out_features, num_blocks, num_groups, blocks_per_split, first_end, second_end, factor,
    GROUP: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr, PLANE: tl.constexpr, RUN: tl.constexpr,
    BASE: tl.constexpr, CENTER: tl.constexpr, MEANING: tl.constexpr, MIXED: tl.constexpr, SHIFT: tl.constexpr,
    STEP: tl.constexpr, EACH: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y[p, t, n] = f sum_{k in p} x[t, k] bf16(s[n, g] v[n, k] + o[n, g]),  summed in float32 on tensor cores

    With many rows, scaling sums costs more than scaling weights, which are rounded to bfloat16 for it; `rounded` says
    how. Reads the matrix once for each BLOCK_M tokens; 2 to 4 N K operations to unpack and scale for each, 2 T N K on
    tensor cores.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    t = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    part_of_k = tl.program_id(2)
    row, token = tl.minimum(n, out_features - 1), tl.minimum(t, num_tokens - 1)
    at = words + row.to(tl.int64)[:, None] * (num_blocks * (PLANE // 2)) + tl.arange(0, PLANE // 2)[None, :]
    bits = entries(table, BITS, MEANING)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(part_of_k * blocks_per_split, tl.minimum((part_of_k + 1) * blocks_per_split, num_blocks)):
        now = fetched(
            scales, zeros, offsets, scale_steps, offset_steps, block, row, out_features, num_groups,
            GROUP, PLANES, PLANE, RUN, SHIFT, STEP, EACH,
        )  # fmt: skip
        word = tl.load(at + block * (PLANE // 2))  # [BLOCK_N, PLANE / 2]
        for first in tl.static_range(0, PLANES, RUN):
            if EACH == 0:
                run = now[first // RUN]
                scale = counted(run[0], run[1], STEP)
                add, shift = shift_of(run, BASE, CENTER, SHIFT, STEP)
            for j in tl.static_range(first, first + RUN):
                k = (block * PLANES + j) * PLANE + tl.arange(0, PLANE)
                xs = activations(x, token, k, in_features, EVEN)
                pairs = values(word, bits, j, BITS, MEANING, MIXED, EACH)
                if EACH != 0:
                    pairs = scaled(pairs, scales, block, j, row, num_blocks, num_groups, GROUP, PLANES, PLANE, EACH)
                    weight = floats(pairs, PLANE)
                else:
                    weight = rounded(pairs, scale, add, shift, SHIFT, PARTS, PLANE)
                total = tl.dot(weight, xs, total)
    start, width = matrix_of(tl.program_id(0) * BLOCK_N, first_end, second_end, out_features)
    base = part_of_k.to(tl.int64) * num_tokens * out_features + start.to(tl.int64) * num_tokens
    to = base + t.to(tl.int64)[None, :] * width + (n - start)[:, None]
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
