"""The extension module (module.cpp, bind_*.cpp). Addresses are `Tensor.data_ptr()` of contiguous CPU tensors."""

from collections.abc import Sequence

from torch import Tensor

INTERFACE: int

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

class Tape:
    """Calls of this thread, kept between start and stop, to be made again by run: tape.hpp says what is kept."""

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def run(self) -> None: ...
    @property
    def num_calls(self) -> int: ...

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

class Int8Group:
    """Matrices of integers that read activations rounded to integers by token: code = round(x / scale + zero).

    Without a scale it follows the largest magnitude of a token (symmetric), or its largest and smallest value, and so
    does zero. code_sums: int32 [N, blocks] for each matrix, where activations have a zero point. Raises ValueError.
    """

    def __init__(
        self,
        members: Sequence[Packed],
        bits: int,
        symmetric: bool,
        scale: float | None,
        zero: int,
        code_sums: Sequence[Tensor],
    ) -> None: ...
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
    offsets: Tensor | None = None,
    scale_steps: Tensor | None = None,
    offset_steps: Tensor | None = None,
) -> Packed:
    """w[n, k] = factors[n] (scales[n, k // group_size] v + offsets[n, k // group_size]),
    v = code - zero (or zeros[n, group]), or table[code].

    codes: [N, ceil(K bits / 8)] uint8, scales and zeros: [N, ceil(K / group_size)], factors: [N] float32 (1 without).
    Scales are float16, bfloat16, float32, or uint8 with scale_type 'e8m0' or 'e4m3'; zeros uint8 or float32. A table
    has at most 16 entries; those that are no small multiples of a common step are rounded to 2^-15 of the largest.
    Offsets, [N, ceil(K / group_size)] float32, go without zero points and tables. With scale_steps, [N, groups / r]
    float16, scales are int8 and count the step of their r groups, which are as long as 4 blocks or a multiple; with
    offset_steps, offsets too.
    ternary: codes 0 to 2 given in 2 bits lie five to a byte; one scale a row. Raises ValueError.
    """

def rms_norm(x: int, weight: int, num_rows: int, width: int, eps: float, normed: int, /) -> None: ...
def add_rms_norm(
    x: int, delta: int, weight: int, num_rows: int, width: int, eps: float, sum: int, normed: int, /
) -> None: ...
def rotate(
    q: tuple[int, int],
    q_heads: int,
    k: tuple[int, int],
    k_heads: int,
    cos: int,
    sin: int,
    num_tokens: int,
    head_dim: int,
    /,
) -> None:
    """q, k: (input, output), [num_tokens, heads, head_dim]; cos, sin: [num_tokens, head_dim / 2]."""

class Combine:
    add: Combine
    subtract: Combine
    multiply: Combine

def combine_rows(op: Combine, x: int, y: int, num_rows: int, width: int, repeated: bool, out: int, /) -> None:
    """out = x op y; repeated: y is one row."""

def clamp(x: int, low: float, high: float, count: int, out: int, /) -> None: ...
def gather_heads(x: int, order: int, num_tokens: int, num_heads: int, head_dim: int, out: int, /) -> None:
    """out[t, h, c] = x[t, h, order[h, c]]; order: [num_heads, head_dim] int64, inside a head."""

def swiglu(gate: int, up: int, count: int, out: int, /) -> None: ...
def argmax(logits: int, size: int, /) -> int:
    """-1 when a logit is NaN or the largest is not finite."""

def draw(logits: int, size: int, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float, /) -> int:
    """The id that `uniform` picks; -1 as for argmax."""

def log_probs(logits: int, size: int, token: int, num_top: int, /) -> tuple[float, list[tuple[int, float]]]: ...
def read_bandwidth(num_threads: int, num_bytes: int = 536870912, seconds: float = 0.3) -> float:
    """Bytes per second that threads read from memory, each from num_bytes / num_threads of its own."""

def dot_peak(num_threads: int, seconds: float = 0.2) -> float:
    """Operations per second of the active instruction set's integer dot products."""

def fma_peak(num_threads: int, seconds: float = 0.2) -> float:
    """Operations per second of float32 multiply-adds."""

class PagedAttention:
    def __init__(
        self,
        shape: tuple[int, int, int, int],  # num_pages, num_kv_heads, head_dim, page_size
        half: bool,
        query_starts: Sequence[int],
        context_lens: Sequence[int],
        block_tables: tuple[int, int, int],  # address, rows, pages of a row
        slots: tuple[int, int],  # address, number
    ) -> None: ...
    def become(self, other: PagedAttention) -> None:
        """Take over what another step was prepared with, and leave it empty."""
    def store(self, k: int, v: int, pages: int) -> None: ...
    def attend(self, q: int, pages: int, out: int, num_heads: int, scale: float) -> None: ...

class QuantizedLayer:
    def __init__(
        self,
        memory: tuple[int, int],  # pages, recent pages
        keys: tuple[int, int, bool],  # clip, prescale, whether its mode is "origin"
        values: tuple[int, int, bool],
    ) -> None: ...

class QuantizedAttention:
    """A format: width (1 for trits), group size, bytes of a row, of its first plane, of a parameter, the largest code,
    and 1 where a Hadamard transform comes first."""

    def __init__(
        self,
        shape: tuple[int, int, int, int],  # num_pages, num_kv_heads, head_dim, page_size
        formats: tuple[tuple[int, int, int, int, int, int, int], tuple[int, int, int, int, int, int, int]],
        high: tuple[Sequence[int], int],  # window of each sequence, sinks
        recent_pages: tuple[bool, int],  # whether they are float16, number
        query_starts: Sequence[int],
        context_lens: Sequence[int],
        block_tables: tuple[int, int, int],  # address, rows, pages of a row
        slots: tuple[int, int],  # address, number
        recent: tuple[int, int, int],  # address of the tables, pages of a row, address of the slots
    ) -> None: ...
    def become(self, other: QuantizedAttention) -> None:
        """Take over what another step was prepared with, and leave it empty."""
    def store(self, k: int, v: int, layer: QuantizedLayer) -> None: ...
    def attend(self, q: int, layer: QuantizedLayer, out: int, num_heads: int, scale: float) -> None: ...

def exp2_negative(x: int, y: int, count: int) -> None: ...

class DenseMatrix:
    @property
    def num_rows(self) -> int: ...
    @property
    def num_channels(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...

class DenseGroup:
    def __init__(self, members: Sequence[DenseMatrix]) -> None: ...
    def run(self, x: int, num_tokens: int, outs: Sequence[int]) -> None: ...

class ExactGroup:
    """Packed matrices times activations that are not rounded."""

    def __init__(self, members: Sequence[Packed]) -> None: ...
    def run(self, x: int, num_tokens: int, outs: Sequence[int]) -> None: ...

def pack_dense(weights: int, type: FloatType, num_rows: int, num_channels: int) -> DenseMatrix: ...
