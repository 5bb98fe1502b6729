"""The memory of one layer's quantized cache, how it is quantized, and what a step says about where its rows stand.

**Read rule.** A query at position i reads key and value j <= i in high precision iff j < S or i - j < W, and from the
packed page otherwise. The rule knows positions alone, so chunks, batches and preemptions cannot change a result.

**Dual write.** Every token is packed into its page at once and also kept in high precision: in the sequence's ring, at
slot position mod ring_slots, and in its sink rows when its position is below S. Nothing moves when a token leaves the
window. All of it holds *transformed* keys (after RoPE) and values: queries turn once, outputs turn back once.

**What the engine must supply**

    ring_ids    a ring for each running sequence, its own until the sequence ends. A sequence that starts behind a
                prefix of p tokens it did not compute needs positions [max(0, p - W + 1), p) in its ring first, copied
                from where they were computed: slots that were never filled are read as they are. A fork copies the
                ring. ring_slots >= W + the most tokens one step may take back (speculation), so that a rolled-back
                step has not displaced what is then needed; rollback is shortening the length.
    sink_ids    rows for the first S positions. They belong to the *first page* of the sequence: whoever shares that
                page shares the sinks, whoever copies it copies them, and S <= page_size makes the two end together.
    zeroing     pages are zeroed when they are allocated for the first time; later owners may leave anything behind.
    codec       one LayerCodec for each layer, the same for as long as the pages live, and part of the prefix salt.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from kernels.attention.quantized.codec import RowCodec
from kernels.attention.quantized.layout import ChunkLayout, RowLayout, split_last
from kernels.attention.quantized.transforms import HeadTransform
from kernels.contract import AttentionInputs, Kernel


@dataclass(frozen=True)
class LayerCodec:
    """How one layer's keys and values are transformed, packed and read."""

    keys: RowCodec
    values: RowCodec
    key_transform: HeadTransform
    value_transform: HeadTransform
    window: int  # W tokens
    num_sinks: int  # S tokens

    def to(self, device: torch.device) -> "LayerCodec":
        """The same with its tensors on `device`."""
        return replace(
            self,
            keys=self.keys.to(device),
            values=self.values.to(device),
            key_transform=self.key_transform.to(device),
            value_transform=self.value_transform.to(device),
        )


@dataclass(frozen=True)
class CacheSize:
    """How much of everything a layer's cache holds."""

    num_pages: int
    page_size: int  # tokens
    num_rings: int
    ring_slots: int  # tokens
    num_sink_rows: int  # sets of S tokens


@dataclass(frozen=True)
class QuantizedCache:
    """One layer. The tensors are mutated by `attend`.

    High-precision keys lie channel by channel and values token by token, as in a page, and for the same reason.
    """

    codec: LayerCodec
    layout: ChunkLayout
    pages: Tensor  # [num_pages, num_kv_heads, chunk_bytes] uint8
    ring_keys: Tensor  # [num_rings, num_kv_heads, D, ring_slots] float16, or float32 for tests
    ring_values: Tensor  # [num_rings, num_kv_heads, ring_slots, D]
    sink_keys: Tensor  # [num_sink_rows, num_kv_heads, D, S]
    sink_values: Tensor  # [num_sink_rows, num_kv_heads, S, D]

    @staticmethod
    def allocate(
        codec: LayerCodec, size: CacheSize, device: torch.device, dtype: torch.dtype = torch.float16
    ) -> "QuantizedCache":
        """Zeroed memory on `device`, where the codec moves too.

        Raises LayoutError or ValueError, naming the sizes, when they do not fit together.
        """
        layout = ChunkLayout(codec.keys.layout, codec.values.layout, size.page_size)
        if size.ring_slots < codec.window:
            raise ValueError(f"rings of {size.ring_slots} slots cannot hold a window of {codec.window} tokens")
        if codec.num_sinks > size.page_size:
            raise ValueError(
                f"{codec.num_sinks} sinks do not fit on one page of {size.page_size} tokens: they are shared with the "
                "first page, so use fewer sinks or larger pages"
            )
        heads, dim = codec.keys.num_heads, layout.head_dim

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return QuantizedCache(
            codec.to(device),
            layout,
            torch.zeros(size.num_pages, heads, layout.chunk_bytes, dtype=torch.uint8, device=device),
            zeros(size.num_rings, heads, dim, size.ring_slots),
            zeros(size.num_rings, heads, size.ring_slots, dim),
            zeros(size.num_sink_rows, heads, dim, codec.num_sinks),
            zeros(size.num_sink_rows, heads, codec.num_sinks, dim),
        )

    @property
    def num_kv_heads(self) -> int:
        return self.pages.shape[1]

    @property
    def ring_slots(self) -> int:
        return self.ring_values.shape[2]


@dataclass(frozen=True)
class QuantizedInputs(AttentionInputs):
    """Where the rows of one step stand in the cache; the same for every layer."""

    ring_ids: tuple[int, ...]  # [num_seqs]
    sink_ids: tuple[int, ...]  # [num_seqs]


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
    """One back end of the quantized cache."""

    def attend(
        self, rows: tuple[Tensor, Tensor, Tensor], cache: QuantizedCache, inputs: QuantizedInputs, scale: float
    ) -> Tensor:
        """Store a step's keys and values, then attend causally under the read rule.

        rows: q [num_tokens, num_heads, D], k and v [num_tokens, num_kv_heads, D], after RoPE; result has q's shape and
        dtype. One verb, not two: a prompt chunk longer than the ring's slack still needs the window before it while it
        attends, so that its own rows enter the ring last. It also leaves a native kernel a single pass over
        (sequence, kv head).
        """
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
