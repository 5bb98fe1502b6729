"""What a page of the quantized codec holds, to the byte.

A page of one layer and one kv head is one contiguous *chunk*, a multiple of 128 bytes:

    [K codes][V codes][K parameters][V parameters]

**A row** is the codes of one token, keys or values. Its bytes are one plane, or two for 3 bits; a byte holds channels
that lie far apart, so that one vector of bytes unpacks with a few shifts, and at 4, 3 and 2 bits rotary partners
(c, c + D/2) share a byte:

    bits   bytes of a plane   byte j holds
    16     2 D                channel j // 2, float16, low byte first
    8      D                  channel j
    4      D / 2              channels j, j + D/2                      at bits 0 and 4
    2      D / 4              channels j, j + D/4, j + D/2, j + 3D/4   at bits 0, 2, 4, 6
    3      D / 4 then D / 8   the low two bits of a code as above; its high bit, channels j + i D/8, at bit i
    1.5    n = ceil(D / 5)    five trits t_i of channels j + i n (0 beyond D): ceil(256 v / 243), v = sum t_i 3^(4-i)

**K codes lie unit by unit, tokens side by side**: a plane is stored as [plane bytes / u][page_size][u] with units of
u bytes: 4 for 8, 4, 3 and 2 bits, 2 for 16 (an element), 1 for 1.5. **V codes lie token by token**: [page_size][row].
The reason is the inner loop of a decode step on a CPU, which serves all query heads of a kv head:

    scores   lanes are tokens:   one load of 16 units is 32 bits of each of 16 tokens; each shift gives one channel of
             16 tokens, and every query head adds q[channel] * that. No horizontal sum, each code unpacked once, and a
             table look-up by the low 4 bits of a lane needs no mask.
    output   lanes are channels: one load of a row's bytes, each shift gives 16 channels of one token, and every query
             head adds weight[token] * that.

A unit belongs to one token, so that writing a token touches no other token's bytes: no read-modify-write, and writing
it again (after a preemption) changes nothing. A GPU reads the same units as the rows of a tensor-core tile.

**Parameters** are [2 num_groups][page_size] elements, keys and values alike: the scales of all groups, then the zeros,
tokens side by side, float8 e4m3 or (8 bits) float16. 16 bits have none.

D = 128, 2 bits, groups of 64: 32 + 32 + 4 + 4 = 72 bytes for a token of one kv head.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

WIDTHS = (16.0, 8.0, 4.0, 3.0, 2.0, 1.5)  # bits of a code; 1.5 is a trit, five to a byte
PAGE_SIZES = (16, 32, 64, 128)  # tokens; multiples of 16 keep every run of tokens a whole vector
RECENT_TOKENS = 16  # tokens of a page of the high-precision window; divides every page size
CHUNK_ALIGNMENT = 128  # bytes: two cache lines, or one transaction of a GPU
TRITS_PER_BYTE = 5


class LayoutError(ValueError):
    """The sizes do not fit together; the message says which would."""


def packing_unit(bits: float) -> int:
    """The number of channels that head_dim must be a multiple of at this width."""
    return {16.0: 1, 8.0: 4, 4.0: 8, 3.0: 32, 2.0: 16, 1.5: 1}[bits]


def split_last(x: Tensor, *sizes: int) -> Tensor:
    """A view of x with its last dimension cut into `sizes`."""
    return x.view(*x.shape[:-1], *sizes)


def name_of(bits: float) -> str:
    """How a width is written: "4", "1.5"."""
    return f"{bits:g}"


@dataclass(frozen=True)
class RowLayout:
    """The keys, or the values, of one token in one kv head. Raises LayoutError when the sizes do not fit together."""

    bits: float  # one of WIDTHS
    head_dim: int  # D
    group_size: int  # g channels share a scale and a zero; divides D

    def __post_init__(self) -> None:
        if self.bits not in WIDTHS:
            raise LayoutError(f"{self.bits:g} bits are not one of {', '.join(map(name_of, WIDTHS))}")
        if self.group_size < 1 or self.head_dim % self.group_size:
            raise LayoutError(f"groups of {self.group_size} do not divide heads of {self.head_dim} channels")
        unit = packing_unit(self.bits)
        if self.head_dim % unit:
            raise LayoutError(
                f"{name_of(self.bits)} bits are packed {unit} channels at a time, which do not divide heads of "
                f"{self.head_dim} channels"
            )

    @property
    def max_code(self) -> int:
        """The largest code, "maxint" of the codec; 0 for 16 bits, which have no codes."""
        return {16.0: 0, 1.5: 2}.get(self.bits, (1 << int(self.bits)) - 1)

    @property
    def num_groups(self) -> int:
        """Groups that have parameters."""
        return 0 if self.bits == 16 else self.head_dim // self.group_size

    @cached_property
    def planes(self) -> tuple[int, ...]:
        """Bytes of each plane of a row."""
        if self.bits == 1.5:
            return (-(-self.head_dim // TRITS_PER_BYTE),)
        if self.bits == 3:
            return (self.head_dim // 4, self.head_dim // 8)
        return (self.head_dim * int(self.bits) // 8,)

    @property
    def unit_bytes(self) -> int:
        """Bytes of a token that stay together where tokens lie side by side."""
        return {16.0: 2, 1.5: 1}.get(self.bits, 4)

    @property
    def row_bytes(self) -> int:
        return sum(self.planes)

    @property
    def parameter_dtype(self) -> torch.dtype:
        """What scales and zeros are stored in; e4m3 would cost 8-bit codes 14 times their own error (g = 64)."""
        return torch.float16 if self.bits == 8 else torch.float8_e4m3fn

    @property
    def num_parameters(self) -> int:
        """Scales and zeros of a token."""
        return 2 * self.num_groups

    @property
    def bytes_per_parameter(self) -> int:
        return 2 if self.bits == 8 else 1

    @property
    def parameter_bytes(self) -> int:
        """Bytes of a token's scales and zeros."""
        return self.num_parameters * self.bytes_per_parameter

    @property
    def token_bytes(self) -> int:
        return self.row_bytes + self.parameter_bytes

    def describe(self) -> str:
        return f"{name_of(self.bits)}-bit g{self.group_size}" if self.num_groups else "16-bit"


@dataclass(frozen=True)
class ChunkLayout:
    """One page of one layer and kv head. Raises LayoutError when the sizes do not fit together."""

    keys: RowLayout
    values: RowLayout
    page_size: int  # tokens

    def __post_init__(self) -> None:
        if self.page_size not in PAGE_SIZES:
            raise LayoutError(f"pages of {self.page_size} tokens are not one of {', '.join(map(str, PAGE_SIZES))}")
        if self.keys.head_dim != self.values.head_dim:
            raise LayoutError(f"keys have {self.keys.head_dim} channels and values {self.values.head_dim}")

    @property
    def head_dim(self) -> int:
        return self.keys.head_dim

    @property
    def key_parameters_at(self) -> int:
        """Where the parameters of the keys begin, in bytes."""
        return self.page_size * (self.keys.row_bytes + self.values.row_bytes)

    @property
    def value_codes_at(self) -> int:
        return self.page_size * self.keys.row_bytes

    @property
    def value_parameters_at(self) -> int:
        return self.key_parameters_at + self.page_size * self.keys.parameter_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token, keys and values."""
        return self.keys.token_bytes + self.values.token_bytes

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a page, rounded up to whole CHUNK_ALIGNMENTs."""
        return -(-self.page_size * self.token_bytes // CHUNK_ALIGNMENT) * CHUNK_ALIGNMENT

    def describe(self) -> str:
        return f"keys {self.keys.describe()}, values {self.values.describe()}, pages of {self.page_size}"
