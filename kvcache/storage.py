"""The memory under the pages."""

import contextlib
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.attention.quantized.cache import LayerCodec, QuantizedCache, recent_page_shape
from kvcache.codecs import calibrated_codec, uncalibrated_codec
from kvcache.layout import PageLayout
from kvcache.manager import PageCopy
from kvcache.policy import CALIBRATED, LayerPolicy

HUGE_PAGE = 2 << 20


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros whose memory is taken as it is written, in huge pages where the system has them.

    Two threads read it at 61 GB/s where pages of 4 KiB give 35. Raises MemoryError.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE") or num_bytes < HUGE_PAGE:
        return torch.zeros(*shape, dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{num_bytes:,} bytes cannot be had: {error}") from error
    with contextlib.suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes, offset=start)
    return flat.view(dtype).view(*shape)


def page_dtype(layer: LayerPolicy) -> torch.dtype:
    """Of the pages of a layer that is not quantized."""
    return torch.float32 if layer.key_bits == 32 else torch.float16


@dataclass(frozen=True)
class SavedPages:
    """Pages copied out to the host, layer by layer."""

    pages: list[Tensor]  # each [number of pages, ...] as in the storage
    recent: list[Tensor]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.pages, *self.recent))


class PageStorage:
    """All pages of all layers, recent pages included. Zeroed, so that a page never read as garbage can hold a NaN.

    Raises PolicyError or MemoryError.
    """

    def __init__(self, layout: PageLayout, num_pages: int, device: torch.device, num_recent_pages: int = 0) -> None:
        self.layout = layout
        self._device = device
        self.layers: list[Any] = [  # as the layer's kernels take it: pages, or a QuantizedCache
            self._quantized(index, num_pages, num_recent_pages)
            if layer.is_quantized
            else zeros((num_pages, *layout.layer_shape), page_dtype(layer), device)
            for index, layer in enumerate(layout.layers)
        ]

    def copy(self, copies: Sequence[PageCopy]) -> None:
        """Make the copies a fork asked for, in every layer."""
        for is_recent in (False, True):
            chosen = [copy for copy in copies if copy.is_recent == is_recent]
            if not chosen:
                continue
            sources = torch.tensor([copy.source for copy in chosen], device=self._device)
            targets = torch.tensor([copy.target for copy in chosen], device=self._device)
            for pages in self._recent_pages() if is_recent else self._pages():
                pages[targets] = pages[sources]

    def save(self, pages: Sequence[int], recent_pages: Sequence[int]) -> SavedPages:
        """Copies of these pages in host memory."""
        chosen, recent = (torch.tensor(ids, dtype=torch.int64, device=self._device) for ids in (pages, recent_pages))
        return SavedPages(
            [layer[chosen].cpu() for layer in self._pages()],
            [layer[recent].cpu() for layer in self._recent_pages()],
        )

    def load(self, saved: SavedPages, copies: Sequence[PageCopy]) -> None:
        """Write saved pages: `source` of a copy counts them, `target` is the page to write."""
        for is_recent in (False, True):
            chosen = [copy for copy in copies if copy.is_recent == is_recent]
            sources = torch.tensor([copy.source for copy in chosen], dtype=torch.int64)
            targets = torch.tensor([copy.target for copy in chosen], dtype=torch.int64, device=self._device)
            layers = (
                zip(self._recent_pages(), saved.recent, strict=True)
                if is_recent
                else zip(self._pages(), saved.pages, strict=True)
            )
            for layer, kept in layers:
                layer[targets] = kept[sources].to(self._device)

    def _pages(self) -> list[Tensor]:
        return [layer if isinstance(layer, Tensor) else layer.pages for layer in self.layers]

    def _recent_pages(self) -> list[Tensor]:
        return [layer.recent for layer in self.layers if isinstance(layer, QuantizedCache)]

    def _codec(self, index: int) -> LayerCodec:
        layer, calibration = self.layout.layers[index], self.layout.calibration
        if layer.transform == CALIBRATED and calibration is not None:
            return calibrated_codec(layer, calibration, index)
        return uncalibrated_codec(layer, self.layout.num_kv_heads, self.layout.head_dim)

    def _quantized(self, index: int, num_pages: int, num_recent_pages: int) -> QuantizedCache:
        heads, dim = self.layout.num_kv_heads, self.layout.head_dim
        chunk = self.layout.chunk(self.layout.layers[index])
        return QuantizedCache(
            self._codec(index).to(self._device),
            chunk,
            zeros((num_pages, heads, chunk.chunk_bytes), torch.uint8, self._device),
            zeros((num_recent_pages, *recent_page_shape(heads, dim)), torch.float16, self._device),
        )
