"""A batch in, logits out."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from engine.batch import Batch


class Model(Protocol):
    """What the runner needs of a model."""

    def forward(self, batch: Batch, pages: Sequence[Tensor]) -> Tensor:
        """Store the batch's keys and values in `pages`, one tensor per layer; return [num_logits, vocab] float32."""
        ...


class Runner:
    """A model bound to the pages of its cache."""

    def __init__(self, model: Model, pages: Sequence[Tensor]) -> None:
        self._model = model
        self._pages = pages  # one tensor per layer

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """Run one step; mutates the pages. Returns [num_logits, vocab] float32 on the CPU, where ids are drawn."""
        return self._model.forward(batch.to(self._pages[0].device), self._pages).cpu()
