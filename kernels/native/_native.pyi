"""The extension module (module.cpp, bind_*.cpp). Addresses are `Tensor.data_ptr()` of contiguous CPU tensors."""

from collections.abc import Sequence

from torch import Tensor

def isa() -> str: ...
def supported_isas() -> list[str]: ...
def use_isa(name: str) -> None: ...
def num_threads() -> int: ...
def set_num_threads(num_threads: int) -> None: ...

class FloatType:
    f16: FloatType
    bf16: FloatType
    f32: FloatType

def quantize_rows(
    weights: int, type: FloatType, num_rows: int, num_channels: int, group: int, codes: int, scales: int
) -> None: ...

class Packed:
    @property
    def num_rows(self) -> int: ...
    @property
    def num_channels(self) -> int: ...
    @property
    def block_channels(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...

class Group:
    def __init__(self, members: Sequence[Packed]) -> None: ...
    def run(self, x: int, num_tokens: int, outs: Sequence[int]) -> None: ...

def pack(
    bits: int,
    num_channels: int,
    group_size: int,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    zero: int = 0,
    table: Sequence[float] | None = None,
    scale_type: str | None = None,
    factors: Tensor | None = None,
    ternary: bool = False,
) -> Packed:
    """w[n, k] = factors[n] scales[n, k // group_size] v, v = code - zero (or zeros[n, group]), or table[code].

    codes: [N, ceil(K bits / 8)] uint8, scales and zeros: [N, ceil(K / group_size)], factors: [N] float32 (1 without).
    Scales are float16, bfloat16, float32, or uint8 with scale_type 'e8m0' or 'e4m3'; zeros uint8 or float32. A table
    has at most 16 entries; those that are no small multiples of a common step are rounded to 2^-15 of the largest.
    ternary: codes 0 to 2 given in 2 bits lie five to a byte; one scale a row. Raises ValueError.
    """

def block_channels_for(group_size: int, num_channels: int, ternary: bool = False) -> int: ...
