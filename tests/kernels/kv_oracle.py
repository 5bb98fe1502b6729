"""The quantized cache's codec once more, from its specification alone: scalar, slow, and sharing no code with it.

Each operation is done in float64 and rounded to float32, which is the correctly rounded float32 operation. float8 e4m3
is a table of its 127 values; codes are found in the raw bytes of a page by arithmetic on their positions.
"""

import math
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention.quantized.cache import LayerCodec, QuantizedCache, recent_page_shape
from kernels.attention.quantized.codec import RowCodec
from kernels.attention.quantized.layout import ChunkLayout, RowLayout, packing_unit

FLOAT16_MAX = 65504.0
# sign 0, exponents 0 (subnormal) to 15, three bits of mantissa; code 127 is NaN
E4M3 = [m / 512 if e == 0 else (8 + m) / 8 * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:127]


def float32(x: float) -> float:
    """The nearest float32."""
    try:
        return float(struct.unpack("f", struct.pack("f", x))[0])
    except OverflowError:
        return math.copysign(math.inf, x)


def to_e4m3(x: float) -> float:
    """The nearest value of e4m3, ties to the even code, saturating; zero without a sign."""
    size = min(abs(x), E4M3[-1])
    code = min(range(127), key=lambda c: (abs(E4M3[c] - size), c % 2))
    return math.copysign(E4M3[code], x) if code else 0.0


def to_float16(x: float) -> float:
    return float(struct.unpack("e", struct.pack("e", min(max(x, -FLOAT16_MAX), FLOAT16_MAX)))[0]) + 0.0


@dataclass(frozen=True)
class Group:
    """g channels of one token and head, quantized."""

    codes: list[int]
    scale: float
    zero: float
    values: list[float]  # what they decode to


def quantize(x: list[float], bits: float, alpha: float, prescale: float, mode: str) -> Group:
    """The formula of the specification, one operation at a time."""
    max_code = {8.0: 255, 4.0: 15, 3.0: 7, 2.0: 3, 1.5: 2}[bits]
    encode, smallest = (to_float16, 2.0**-24) if bits == 8 else (to_e4m3, 2.0**-9)
    if any(math.isnan(value) for value in x):
        return Group([0] * len(x), math.nan, math.nan, [math.nan] * len(x))
    x = [min(max(value, -FLOAT16_MAX), FLOAT16_MAX) for value in x]
    if mode == "origin":
        low, high = float32(alpha * min(x)), float32(alpha * max(x))
    else:
        middle = float32(float32(min(x) + max(x)) * 0.5)
        half = float32(float32(float32(max(x) - min(x)) * 0.5) * alpha)
        low, high = float32(middle - half), float32(middle + half)
    scale = max(encode(float32(float32(float32(high - low) / max_code) / prescale)), smallest)
    zero = encode(float32(low / prescale))
    steps = [float32(float32(float32(value / prescale) - zero) / scale) for value in x]
    codes = [round(min(max(step, 0), max_code)) for step in steps]
    values = [float32(float32(float32(code * scale) + zero) * prescale) for code in codes]
    return Group(codes, scale, zero, values)


def place(layout: RowLayout, channel: int) -> list[tuple[int, int, int]]:
    """Where the bits of a code lie in a row: (byte, lowest bit, number of bits), low bits first. Not for trits."""
    dim = layout.head_dim
    if layout.bits == 8:
        return [(channel, 0, 8)]
    if layout.bits == 4:
        return [(channel % (dim // 2), channel // (dim // 2) * 4, 4)]
    low = (channel % (dim // 4), channel // (dim // 4) * 2, 2)
    if layout.bits == 2:
        return [low]
    return [low, (dim // 4 + channel % (dim // 8), channel // (dim // 8), 1)]


def code_in_row(row: list[int], layout: RowLayout, channel: int) -> int:
    if layout.bits == 1.5:
        rest, which = row[channel % len(row)], channel // len(row)
        for _ in range(which):
            rest = 3 * rest & 255
        return 3 * rest >> 8
    code = shift = 0
    for byte, bit, width in place(layout, channel):
        code |= (row[byte] >> bit & ((1 << width) - 1)) << shift
        shift += width
    return code


def row_in_chunk(
    chunk: Tensor, layouts: tuple[RowLayout, RowLayout], page_size: int, which: int, token: int
) -> list[int]:
    """The bytes of one token's keys (`which` 0) or values (1), from the raw bytes of a page of one kv head."""
    keys, values = layouts
    if which == 1:
        start = page_size * keys.row_bytes + token * values.row_bytes
        return [int(byte) for byte in chunk[start : start + values.row_bytes]]
    unit = {16.0: 2, 1.5: 1}.get(keys.bits, 4)
    row, plane_at = [], 0
    for plane in [keys.head_dim // 4, keys.head_dim // 8] if keys.bits == 3 else [keys.row_bytes]:
        for j in range(plane):
            row.append(int(chunk[plane_at + (j // unit * page_size + token) * unit + j % unit]))
        plane_at += plane * page_size
    return row


def dims_of(bits: float) -> list[int]:
    """A few head sizes that this width can pack."""
    return [dim for dim in (32, 64, 80, 96, 128) if dim % packing_unit(bits) == 0]


def row_codec(bits: float, head_dim: int, group_size: int, num_heads: int, seed: int | None = None) -> RowCodec:
    """Clip 1 and prescale 1, or random ones of `seed`."""
    layout = RowLayout(bits, head_dim, group_size)
    if seed is None:
        return RowCodec(layout, torch.ones(num_heads, layout.num_groups), torch.ones(num_heads))
    generator = torch.Generator().manual_seed(seed)
    clip = torch.rand(num_heads, layout.num_groups, generator=generator) * 0.5 + 0.5
    prescale = 2.0 ** torch.randint(-6, 7, (num_heads,), generator=generator)
    return RowCodec(layout, clip.half().float(), prescale, ("mid", "origin")[seed % 2])


def cache_of(codec: LayerCodec, sizes: tuple[int, int, int], dtype: torch.dtype = torch.float16) -> QuantizedCache:
    """Zeros. sizes: number of pages, tokens of a page, number of recent pages."""
    num_pages, page_size, num_recent = sizes
    layout, heads = ChunkLayout(codec.keys.layout, codec.values.layout, page_size), codec.keys.num_heads
    pages = torch.zeros(num_pages, heads, layout.chunk_bytes, dtype=torch.uint8)
    recent = torch.zeros(num_recent, *recent_page_shape(heads, layout.head_dim), dtype=dtype)
    return QuantizedCache(codec, layout, pages, recent)
