"""The memory of one layer's quantized cache, and how it is quantized.

**Read rule.** A query at position i reads key and value j <= i in high precision iff j < S or i - j < W, and from the
packed page otherwise. The rule knows positions alone, so chunks, batches and preemptions cannot change a result. W is
the codec's, or what a step says of a sequence (RecentInputs.windows); no row depends on its neighbours' windows.

**Dual write.** Every token is packed into its page at once. Where its sequence holds a *recent page* for it, it is also
kept there in high precision. Nothing moves when a token leaves the window: its recent page is handed to someone else.
All of it holds *transformed* keys (after RoPE) and values: queries turn once, outputs turn back once.

**Recent pages** are pages of the f16 codec (kernels/attention/f16/layout.py) of RECENT_TOKENS tokens: token j of a
sequence lies in row j % RECENT_TOKENS of recent page tables[j // RECENT_TOKENS].

**What the engine must supply**

    recent    pages for all that the rows of a step read in high precision: with rows start..stop - 1, positions
              (start - W, stop) when W > 0, and positions below min(S, stop). Those before `start` were written by the
              steps before, or by another sequence with the same tokens: both give the same bytes. What else lies in
              a recent page is never read.
    zeroing   pages are zeroed when they are allocated for the first time; later owners may leave anything behind.
    codec     one LayerCodec for each layer, the same for as long as the pages live, and part of the prefix salt.
"""

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from kernels.attention.f16.layout import CACHE_DTYPES, page_shape
from kernels.attention.quantized.codec import RowCodec
from kernels.attention.quantized.layout import RECENT_TOKENS, ChunkLayout, RowLayout, split_last
from kernels.attention.quantized.transforms import HeadTransform
from kernels.contract import AttentionInputs, Kernel


@dataclass(frozen=True)
class KeyShift:
    """k' = (k - offset) scale and q' = q / scale leave attention as it is: q' . k' = q . k - q . offset, and what is
    taken off is the same for all keys that a query sees, so that softmax takes no notice."""

    offset: Tensor  # [num_kv_heads, D] float32
    scale: Tensor  # [num_kv_heads, D] float32, powers of two, so that scaling adds no error
    # query heads -> 1 / scale of each, [heads, D], which is exact
    _inverses: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def inverse(self, num_heads: int) -> Tensor:
        """What queries are multiplied by: [num_heads, D]."""
        inverse = self._inverses.get(num_heads)
        if inverse is None:
            inverse = (1 / self.scale).repeat_interleave(num_heads // len(self.scale), dim=0)
            self._inverses[num_heads] = inverse
        return inverse

    def to(self, device: torch.device) -> "KeyShift":
        return KeyShift(self.offset.to(device), self.scale.to(device))


@dataclass(frozen=True)
class LayerCodec:
    """How one layer's keys and values are transformed, packed and read."""

    keys: RowCodec
    values: RowCodec
    key_transform: HeadTransform
    value_transform: HeadTransform
    window: int  # W tokens, of sequences that are not given another
    num_sinks: int  # S tokens
    key_shift: KeyShift | None = None  # before the transform of keys

    def prepare_keys(self, k: Tensor) -> Tensor:
        """k: [num_tokens, num_kv_heads, D] float32, finite, as they come before the transform."""
        return k if self.key_shift is None else (k - self.key_shift.offset).mul_(self.key_shift.scale)

    def prepare_queries(self, q: Tensor) -> Tensor:
        """q: [num_tokens, num_heads, D] float32, likewise."""
        return q if self.key_shift is None else q * self.key_shift.inverse(q.shape[1])

    def to(self, device: torch.device) -> "LayerCodec":
        """The same with its tensors on `device`."""
        return replace(
            self,
            keys=self.keys.to(device),
            values=self.values.to(device),
            key_transform=self.key_transform.to(device),
            value_transform=self.value_transform.to(device),
            key_shift=None if self.key_shift is None else self.key_shift.to(device),
        )


def recent_page_shape(num_kv_heads: int, head_dim: int) -> tuple[int, int, int, int]:
    """The shape of one recent page of one layer."""
    return page_shape(num_kv_heads, RECENT_TOKENS, head_dim)


@dataclass(frozen=True)
class QuantizedCache:
    """One layer. The tensors are mutated by `store`. Raises ValueError, naming the tensor, when they do not fit."""

    codec: LayerCodec  # on the pages' device
    layout: ChunkLayout
    pages: Tensor  # [num_pages, num_kv_heads, chunk_bytes] uint8
    recent: Tensor  # [num_recent_pages, 2, num_kv_heads, RECENT_TOKENS, D] float16, or float32 for tests
    # What a kernel made of these; not what replace() takes over.
    prepared: dict[str, object] = field(init=False, default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        heads = self.codec.keys.num_heads
        for name, tensor, shape, dtypes in (
            ("pages", self.pages, (heads, self.layout.chunk_bytes), (torch.uint8,)),
            ("recent pages", self.recent, recent_page_shape(heads, self.layout.head_dim), CACHE_DTYPES),
        ):
            if tuple(tensor.shape[1:]) != shape or tensor.dtype not in dtypes:
                found, expected = f"{list(tensor.shape)} {tensor.dtype}", f"{['n', *shape]} {dtypes}"
                raise ValueError(f"{name} of {self.layout.describe()} are {found}, expected {expected}")

    @property
    def num_kv_heads(self) -> int:
        return self.pages.shape[1]

    def windows(self, inputs: AttentionInputs) -> list[int]:
        """W of each sequence of a step, [num_seqs]."""
        if inputs.recent is None:
            return [self.codec.window] * len(inputs.context_lens)
        return [self.codec.window if window is None else window for window in inputs.recent.windows]

    @property
    def device(self) -> torch.device:
        return self.pages.device


@dataclass(frozen=True)
class QuantizedSpec:
    """One attention layer over quantized pages, as a kernel sees it."""

    num_heads: int
    num_kv_heads: int
    layout: ChunkLayout
    device: torch.device
    dtype: torch.dtype  # of the activations

    def __str__(self) -> str:
        return f"attention with {self.num_heads}/{self.num_kv_heads} heads over {self.layout.describe()}"


class QuantizedKernel(Kernel, Protocol):
    """One back end of the quantized cache. The same two verbs as those of kernels.contract.AttentionKernel."""

    def store(self, k: Tensor, v: Tensor, cache: QuantizedCache, inputs: AttentionInputs) -> None:
        """Write a step's keys (after RoPE) and values, [num_tokens, num_kv_heads, D]: to their pages, and to recent
        pages where they have one."""
        ...

    def attend(self, q: Tensor, cache: QuantizedCache, inputs: AttentionInputs, scale: float) -> Tensor:
        """Causal attention of q: [num_tokens, num_heads, D] under the read rule; result has q's shape and dtype. The
        step's own rows are stored already."""
        ...


def page_views(pages: Tensor, layout: ChunkLayout) -> tuple["RowViews", "RowViews"]:
    """Views of the keys and of the values in `pages` [num_pages, num_kv_heads, chunk_bytes]."""
    keys = _section(pages, 0, layout.page_size, layout.keys.planes, layout.keys.unit_bytes)
    values = _section(pages, layout.value_codes_at, layout.page_size, (layout.values.row_bytes,), None)
    key_parameters = _parameters(pages, layout.key_parameters_at, layout.page_size, layout.keys)
    value_parameters = _parameters(pages, layout.value_parameters_at, layout.page_size, layout.values)
    return RowViews(keys, key_parameters), RowViews(values, value_parameters)


@dataclass(frozen=True)
class RowViews:
    """Keys or values in pages, by token: writing an element writes the page."""

    planes: tuple[Tensor, ...]  # each [num_pages, num_kv_heads, page_size, units, unit bytes] uint8
    parameters: Tensor  # [num_pages, num_kv_heads, page_size, num_parameters, bytes of one] uint8

    def write(self, at: tuple[Tensor, Tensor], rows: Tensor, parameters: Tensor) -> None:
        """at: page ids and rows in the page, each [n]; rows: [n, num_kv_heads, row_bytes], parameters as encoded."""
        pages, tokens = at
        start = 0
        for plane in self.planes:
            units, unit = plane.shape[-2:]
            part = rows[..., start : start + units * unit]
            plane[pages, :, tokens] = part.reshape(*part.shape[:-1], units, unit)
            start += units * unit
        self.parameters[pages, :, tokens] = parameters

    def read(self) -> tuple[Tensor, Tensor]:
        """Rows [num_pages, num_kv_heads, page_size, row_bytes] and parameters, copied."""
        return torch.cat([plane.flatten(-2) for plane in self.planes], dim=-1), self.parameters.contiguous()


def _section(
    pages: Tensor, start: int, page_size: int, planes: tuple[int, ...], unit: int | None
) -> tuple[Tensor, ...]:
    """Codes from byte `start` on. A unit of None: token by token."""
    views = []
    for plane in planes:
        part = pages[..., start : start + page_size * plane]
        if unit is None:
            views.append(split_last(part, page_size, 1, plane))
        else:
            views.append(split_last(part, plane // unit, page_size, unit).transpose(2, 3))
        start += page_size * plane
    return tuple(views)


def _parameters(pages: Tensor, start: int, page_size: int, row: RowLayout) -> Tensor:
    part = pages[..., start : start + page_size * row.parameter_bytes]
    return split_last(part, row.num_parameters, page_size, row.bytes_per_parameter).transpose(2, 3)
