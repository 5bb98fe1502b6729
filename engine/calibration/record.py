"""A model's queries, keys and values, one layer at a time: only one layer's are ever held."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from engine.batch import BatchRow, build_batch
from engine.models.decoder import Decoder, Layer
from kernels.attention.f16.layout import page_shape
from kernels.attention.quantized.cache import QuantizedKernel
from kernels.contract import AttentionInputs, AttentionKernel

PAGE_SIZE = 64  # tokens


@dataclass(frozen=True)
class Recorded:
    """One text as one layer saw it, after RoPE, in float32."""

    queries: Tensor  # [num_tokens, num_heads, D]
    keys: Tensor  # [num_tokens, num_kv_heads, D]
    values: Tensor  # [num_tokens, num_kv_heads, D]


class Recorder:
    """An attention kernel over floating point pages that remembers what it was given."""

    name = "recorder"

    def __init__(self, kernel: AttentionKernel | QuantizedKernel) -> None:
        self._kernel = kernel
        self._recorded: list[tuple[Tensor, Tensor, Tensor]] = []
        self._stored: tuple[Tensor, Tensor] | None = None

    def refuses(self, spec: object) -> str | None:
        return None

    def store(self, k: Tensor, v: Tensor, pages: Any, inputs: AttentionInputs) -> None:
        self._stored = (k, v)
        self._kernel.store(k, v, pages, inputs)

    def attend(self, q: Tensor, pages: Any, inputs: AttentionInputs, scale: float) -> Tensor:
        assert self._stored is not None
        self._recorded.append((q, *self._stored))
        return self._kernel.attend(q, pages, inputs, scale)

    def take(self) -> Recorded:
        """What was given since the last time."""
        parts, self._recorded = self._recorded, []
        q, k, v = (torch.cat([part[i] for part in parts]).float().cpu() for i in range(3))
        return Recorded(q, k, v)


def record(model: Decoder, texts: Sequence[Sequence[int]], chunk: int) -> Iterator[list[Recorded]]:
    """For every layer, every text as the layer saw it. The cache keeps float32, so that nothing is rounded.

    texts: token ids of equal length; chunk: tokens of a step.
    """
    streams = [_Stream(model, text, chunk) for text in texts]
    for layer in model.layers:
        recorder = Recorder(layer.attention.kernel)
        watched = replace(layer, attention=replace(layer.attention, kernel=recorder))
        held = []
        for stream in streams:
            stream.run(watched)
            held.append(recorder.take())
        yield held


class _Stream:
    """The residual stream of one text on its way through the layers."""

    @torch.inference_mode()
    def __init__(self, model: Decoder, text: Sequence[int], chunk: int) -> None:
        num_pages = -(-len(text) // PAGE_SIZE)
        table = list(range(num_pages))
        rows = [BatchRow(list(text[at : at + chunk]), at, table, PAGE_SIZE, 0) for at in range(0, len(text), chunk)]
        self._batches = [build_batch([row]) for row in rows]
        self._rope = model.rope
        self._x = [model.embedding(batch.input_ids) for batch in self._batches]
        self._delta = [torch.zeros_like(x) for x in self._x]
        self._page_shape = (num_pages, *page_shape(model.config.num_kv_heads, PAGE_SIZE, model.config.head_dim))

    @torch.inference_mode()
    def run(self, layer: Layer) -> None:
        pages = torch.zeros(self._page_shape)
        for i, batch in enumerate(self._batches):
            x, normed = layer.input_norm.add(self._x[i], self._delta[i])
            rotation = self._rope.angles(batch.positions)
            attended = layer.attention(normed, rotation, pages, batch.attention)
            self._x[i], normed = layer.post_attention_norm.add(x, attended)
            self._delta[i] = layer.mlp(normed)
