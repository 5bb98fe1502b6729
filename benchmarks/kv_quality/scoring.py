"""An engine core in this process whose cache, codecs and attention kernels a measurement may replace."""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from engine.assembly import build
from engine.batch import Batch, BatchRow, build_batch
from engine.config import EngineConfig, Prefill
from engine.core import EngineCore
from engine.loading import load_model, open_checkpoint
from engine.messages import Done, Failed, Sampling, Submit, Token
from engine.models.decoder import Decoder
from engine.runner import Runner
from kernels.attention.quantized.cache import LayerCodec
from kernels.attention.quantized.layout import RECENT_TOKENS
from kvcache.storage import PageStorage

CHUNK = 512  # tokens of a step
MEMORY = 384 << 20  # bytes of cache: all questions about one text, and room
SEATS = 32

Wrap = Callable[[Any, int], Any]  # (attention kernel, layer) -> the kernel in its place


@dataclass(frozen=True)
class Subject:
    """What is measured: a checkpoint under one policy, with an artifact or codecs of its own."""

    model: Path
    policy: str
    artifact: Path | None = None
    codecs: tuple[LayerCodec, ...] | None = None  # in place of what the policy says, one for each layer
    wrap: Wrap | None = None
    prefill: Prefill = "windowed"


@dataclass
class Recorder:
    """The engine's runner, whose logits are kept."""

    runner: Runner
    kept: list[Tensor] = field(default_factory=list)

    def run(self, batch: Batch) -> Tensor:
        logits = self.runner.run(batch)
        self.kept.append(logits)
        return logits


class Engine:
    """Activations and head stay as the checkpoint has them: what differs is the cache's doing.

    Raises StartError when the policy, or its artifact, cannot serve the model.
    """

    def __init__(self, subject: Subject) -> None:
        config = EngineConfig(
            str(subject.model),
            kv_policy=subject.policy,
            kv_calibration=None if subject.artifact is None else str(subject.artifact),
            kv_memory=MEMORY,
            kv_prefill=subject.prefill,
            max_num_seqs=SEATS,
            threads=1,
            activations="float",
            head_bits=16,
        )
        parts = build(config)[0].parts
        self.layout, self.storage = parts.storage.layout, parts.storage
        for index, codec in enumerate(subject.codecs or ()):
            self.storage.layers[index] = replace(self.storage.layers[index], codec=codec)
        self.model = _wrapped(load_model(open_checkpoint(subject.model), parts.plan).model, subject.wrap)
        self._recorder = Recorder(Runner(self.model, self.storage.layers))
        self._core = EngineCore(replace(parts, runner=cast(Runner, self._recorder)))
        self._ids = itertools.count()

    def score(self, ids: list[int]) -> Tensor:
        """Log-probabilities of the next token at every position, through the cache: [num_tokens, vocab] float32."""
        self._recorder.kept.clear()
        self._run([ids], Sampling(0, num_prompt_logprobs=0))
        return torch.cat(self._recorder.kept).log_softmax(-1)

    def read_answer(self, ids: list[int], num_prompt: int, is_exact: bool) -> Tensor:
        """Log-probabilities of what follows each of ids[num_prompt:], as if it were the answer to the rest, read by
        the policy's rule: [num_tokens - num_prompt, vocab] float32.

        is_exact: the prompt reads all of itself in high precision.
        """
        page_size = self.layout.page_size
        pages, recent = (list(range(-(-len(ids) // size))) for size in (page_size, RECENT_TOKENS))
        storage = PageStorage(self.layout, len(pages), torch.device("cpu"), len(recent))
        runner, held = Runner(self.model, storage.layers), dict(enumerate(recent))
        windows = [(0, num_prompt, len(ids) if is_exact else None), (num_prompt, len(ids), None)]
        kept = []
        for first, stop, window in windows:
            for start in range(first, stop, CHUNK):
                chunk = ids[start : min(start + CHUNK, stop)]
                num_logits = len(chunk) if start >= num_prompt else 1
                row = BatchRow(chunk, start, pages, page_size, num_logits, held, window)
                kept.append((start, runner.run(build_batch([row]))))
        return torch.cat([logits for start, logits in kept if start >= num_prompt]).log_softmax(-1)

    def answer(self, prompts: Sequence[list[int]], num_tokens: int) -> list[list[int]]:
        """What greedy decoding gives, in the prompts' order."""
        answers = self._run(prompts, Sampling(num_tokens, temperature=0.0, ignore_eos=True))
        self._recorder.kept.clear()
        return answers

    def _run(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[list[int]]:
        requests = [Submit(str(next(self._ids)), ids, sampling, time.monotonic()) for ids in prompts]
        answers: dict[str, list[int]] = {request.id: [] for request in requests}
        unfinished = set(answers)
        events = self._core.step(requests)
        while unfinished:
            for event in events:
                if isinstance(event, Failed):
                    raise RuntimeError(event.message)
                if isinstance(event, Token):
                    answers[event.id].append(event.token)
                elif isinstance(event, Done):
                    unfinished.discard(event.id)
            events = self._core.step([]) if unfinished else []
        return list(answers.values())


def _wrapped(model: Decoder, wrap: Wrap | None) -> Decoder:
    if wrap is None:
        return model
    layers = tuple(
        replace(layer, attention=replace(layer.attention, kernel=wrap(layer.attention.kernel, index)))
        for index, layer in enumerate(model.layers)
    )
    return replace(model, layers=layers)


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
