"""Steps of few rows on a CPU, whose layers are one native call.

Between the kernels of a decode step Python takes some 100 us a layer: a quarter of the time of a 0.5B model. What it
does there depends on the number of rows alone, so the first step of each number records its native calls, and further
ones make them again (kernels/native/recording.py). Results have the same bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.batch import Batch
from engine.models.decoder import Decoder, Stream
from engine.models.layers import Rotation
from engine.runner import Runner
from kernels import native
from kernels.contract import AttentionInputs
from kernels.native.recording import Buffers, Recording, Step, StepKernel, Unrecordable

MAX_ROWS = 16  # of a recorded step; with more, Python is a small part, and what is written in between a large one


@dataclass(frozen=True)
class Tape:
    """The layers for one number of rows."""

    recording: Recording
    first: Stream  # what the recorded calls read
    last: Stream  # what they write
    # Kernel, cache and what was prepared, of every attention that prepares for itself. Layers that share it do so for
    # any rows: windows and sinks hold for all layers.
    steps: Sequence[tuple[StepKernel, Any, Step]]

    def run(self, stream: Stream, inputs: AttentionInputs) -> Stream:
        """The layers for `stream`; what they give is overwritten by the next run."""
        _copy(self.first, stream)
        for kernel, cache, step in self.steps:
            step.become(kernel.new_step(cache, inputs))
        self.recording.run()
        return self.last


class TapeRunner(Runner):
    """A runner whose small steps are recorded as they first come."""

    def __init__(self, model: Decoder, caches: Sequence[Any]) -> None:
        super().__init__(model, caches)
        self.model: Decoder = model
        self.tapes: dict[int, Tape] = {}  # by number of rows
        self._buffers = Buffers(MAX_ROWS)
        self._note: str | None = None
        self._has_run = False  # kernels and codecs make what they keep in the first step, which is not recorded

    @property
    def note(self) -> str | None:
        return self._note

    @property
    def num_bytes(self) -> int:
        """What the layers write between their kernels, for all numbers of rows."""
        return self._buffers.num_bytes

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """Run one step; mutates the cache. Returns [num_logits, vocab] float32."""
        num_rows = len(batch.input_ids)
        tape = self.tapes.get(num_rows)
        if tape is None and (num_rows > MAX_ROWS or self._note is not None or not self._has_run):
            self._has_run = True
            return super().run(batch)
        stream = self.model.embed(batch)
        if tape is not None:
            return self.model.logits(tape.run(stream, batch.attention), batch.logit_rows)
        try:
            tape = self.tapes[num_rows] = self._record(stream, batch)
        except Unrecordable as error:  # what was stored on the way is stored again
            self._note = f"layers are called from Python, kernel by kernel, because {error}"
            return super().run(batch)
        return self.model.logits(tape.last, batch.logit_rows)

    def _record(self, stream: Stream, batch: Batch) -> Tape:
        """Run the layers and keep their calls. Raises Unrecordable."""
        recording = Recording(self._buffers)
        last = stream
        with recording:
            for layer, cache in zip(self.model.layers, self.caches, strict=True):
                recording.next_layer()
                last = layer(last, cache, batch)
        steps: dict[int, tuple[StepKernel, Any, Step]] = {}
        for layer, cache in zip(self.model.layers, self.caches, strict=True):
            kernel = layer.attention.kernel
            assert isinstance(kernel, StepKernel)  # runner_of saw to it
            step = kernel.step(cache, batch.attention)
            steps.setdefault(id(step), (kernel, cache, step))
        return Tape(recording, stream, last, tuple(steps.values()))


def runner_of(model: Decoder, caches: Sequence[Any]) -> Runner:
    """The runner of a model on the CPU: it records where attention is native."""
    if native.MISSING is None and all(isinstance(layer.attention.kernel, StepKernel) for layer in model.layers):
        return TapeRunner(model, caches)
    return Runner(model, caches)


def _copy(held: Stream, stream: Stream) -> None:
    """delta stays what it was: zeros, for the first layer."""
    held.x.copy_(stream.x)
    _copy_rotation(held.rotation, stream.rotation)


def _copy_rotation(held: Rotation, rotation: Rotation) -> None:
    held.cos.copy_(rotation.cos)
    held.sin.copy_(rotation.sin)
