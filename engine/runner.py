"""A batch in, logits out."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.batch import Batch


class Model(Protocol):
    """What the runner needs of a model."""

    def forward(self, batch: Batch, caches: Sequence[Any], /) -> Tensor:
        """Store the batch's keys and values in `caches`, one per layer; return [num_logits, vocab] float32."""
        ...


class Runner:
    """A model bound to its cache."""

    def __init__(self, model: Model, caches: Sequence[Any]) -> None:
        self.model = model
        self.caches = caches  # one per layer: pages, or a QuantizedCache

    @property
    def note(self) -> str | None:
        """What the start screen says of how steps are run, once one was."""
        return None

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """Run one step; mutates the cache. Returns [num_logits, vocab] float32 on the model's device."""
        return self.model.forward(batch.to(self.caches[0].device), self.caches)
