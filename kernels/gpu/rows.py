"""The Triton kernels for ops on rows: RMSNorm with the addition before it, RoPE, SwiGLU. Arithmetic is in float32."""

import triton
import triton.language as tl


@triton.jit
def rms_norm(x, delta, weight, total, out, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """y = w (x / sqrt(mean(x^2) + eps)), the bracket rounded before it is scaled; with ADD x is x + delta, kept in
    `total` as it was rounded. A program is a row.

    Reads and writes a row once: 4 bytes and 4 operations an element, 8 and 5 with ADD.
    """
    row = tl.program_id(0).to(tl.int64) * width
    i = tl.arange(0, BLOCK)
    inside = i < width
    wide = tl.load(x + row + i, inside, other=0).to(tl.float32)
    if ADD:
        summed = (wide + tl.load(delta + row + i, inside, other=0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + row + i, summed, inside)
        wide = summed.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / width + eps)
    normed = (wide * scale).to(out.dtype.element_ty).to(tl.float32)
    tl.store(
        out + row + i, (normed * tl.load(weight + i, inside, other=0).to(tl.float32)).to(out.dtype.element_ty), inside
    )


@triton.jit
def turn(x, out, head, angle, half, BLOCK: tl.constexpr):
    """One head, 2 * half channels from `head` on, by the angles whose cosines and sines are given."""
    cos, sin = angle
    i = tl.arange(0, BLOCK)
    inside = i < half
    low = tl.load(x + head + i, inside, other=0).to(tl.float32)
    high = tl.load(x + head + half + i, inside, other=0).to(tl.float32)
    tl.store(out + head + i, (low * cos - high * sin).to(out.dtype.element_ty), inside)
    tl.store(out + head + half + i, (high * cos + low * sin).to(out.dtype.element_ty), inside)


@triton.jit
def rotate_pair(q, k, cos, sin, q_out, k_out, num_heads, num_kv_heads, half, BLOCK: tl.constexpr):
    """y[i] = x[i] cos[i] - x[i + D/2] sin[i],  y[i + D/2] = x[i + D/2] cos[i] + x[i] sin[i]

    A program is one head of one token, query heads first. 4 bytes and 3 operations an element, and the angles.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    i = tl.arange(0, BLOCK)
    at = token * half + i
    angle = (tl.load(cos + at, i < half, other=0), tl.load(sin + at, i < half, other=0))
    if head < num_heads:
        turn(q, q_out, (token * num_heads + head) * 2 * half, angle, half, BLOCK)
    else:
        turn(k, k_out, (token * num_kv_heads + head - num_heads) * 2 * half, angle, half, BLOCK)


@triton.jit(do_not_specialize=["count"])
def swiglu(gate, up, out, count, BLOCK: tl.constexpr):
    """y = gate / (1 + exp(-gate)) up. 6 bytes and 5 operations an element."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wide = tl.load(gate + i, i < count, other=0).to(tl.float32)
    y = wide / (1.0 + tl.exp(-wide)) * tl.load(up + i, i < count, other=0).to(tl.float32)
    tl.store(out + i, y.to(out.dtype.element_ty), i < count)
