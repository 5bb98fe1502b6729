"""The memory under the pages."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcache.layout import PageLayout
from kvcache.manager import PageCopy

PAGE_DTYPES = {"f16": torch.float16, "f32": torch.float32}


class PageStorage:
    """All pages of all layers. Zeroed, so that a page never read as garbage can hold a NaN."""

    def __init__(self, layout: PageLayout, num_pages: int, device: torch.device) -> None:
        self.layout = layout
        dtype = PAGE_DTYPES[layout.policy.name]
        shape = (num_pages, *layout.layer_shape)
        self.layers: list[Tensor] = [  # each [num_pages, 2, num_kv_heads, page_size, head_dim]
            torch.zeros(shape, dtype=dtype, device=device) for _ in range(layout.num_layers)
        ]

    def copy(self, copies: Sequence[PageCopy]) -> None:
        """Make the copies a fork asked for, in every layer."""
        if not copies:
            return
        sources = torch.tensor([copy.source for copy in copies], device=self.layers[0].device)
        targets = torch.tensor([copy.target for copy in copies], device=self.layers[0].device)
        for pages in self.layers:
            pages[targets] = pages[sources]
