"""Decode steps on a GPU as recorded graphs: one for each padded number of sequences and length of context.

Launching a step's few hundred kernels one by one takes the host longer than a GPU takes to run them; a graph is one
launch. It reads its inputs from tensors that stay where they are, so a step is padded to a recorded size and copied
into them. All graphs leave their logits in one place: if each kept its own they would take memory for every size.
Padding repeats the sequence with the shortest context: it stores the same bytes in the same place once more, and its
logits are cut off. Steps with prompts run as they are. All graphs are recorded at start: no request waits for a
recording, or for Triton's compiler.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from engine.batch import Batch, BatchRow, build_batch
from engine.config import Plan
from engine.models.decoder import Decoder
from engine.runner import Model, Runner
from engine.tapes import runner_of
from kernels.attention.quantized.layout import RECENT_TOKENS
from kernels.contract import RecentInputs
from kernels.gpu.steps import refill as refill_tiles
from kernels.transfer import Parcel, refill, send

SHORTEST = 2048  # tokens of the first context length; each further one is four times as long
GROWTH = 4
MOST_LOGITS = 65  # rows of a head at start: as many as prompts whose tokens are scored have, for the choice of kernels
PROMPTS = (16, 64)  # rows of prompts that are run once at start, beside the longest: each is another kernel

Replay = Callable[[], Tensor]


class Recorder(Protocol):
    """How a step is recorded."""

    def record(self, step: Replay) -> Replay:
        """Run `step` once, record it, and return what runs the recording again and gives the tensor that it fills."""
        ...


class CudaRecorder:
    """CUDA graphs that share their memory: one runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        make_stream: Any = torch.cuda.Stream  # without types
        self._aside = make_stream()  # one for all sizes: torch keeps a workspace for cuBLAS, 32 MiB on sm_90, for each

    def record(self, step: Replay) -> Replay:
        """Raises RuntimeError when the step waits for the host."""
        self._aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._aside):
            step()  # compiles, and allocates what libraries keep
        torch.cuda.current_stream().wait_stream(self._aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = step()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


@dataclass(frozen=True, order=True)
class Size:
    """What a graph is recorded for; smaller ones come first."""

    num_seqs: int
    context_len: int  # tokens, the longest


def sizes(max_num_seqs: int, max_model_len: int) -> list[Size]:
    """Powers of two up to max_num_seqs, each at context lengths up to max_model_len."""
    counts = [1 << i for i in range(max_num_seqs.bit_length()) if 1 << i < max_num_seqs] + [max_num_seqs]
    lengths = [SHORTEST]
    while lengths[-1] < max_model_len:
        lengths.append(lengths[-1] * GROWTH)
    return [Size(count, min(length, max_model_len)) for count in counts for length in lengths]


def size_for(batch: Batch, among: Sequence[Size]) -> Size | None:
    """The smallest recorded size that holds a decode step; None for steps with prompts or windows of their own."""
    inputs = batch.attention
    num_seqs, longest = len(inputs.context_lens), max(inputs.context_lens)
    if inputs.query_starts[-1] != num_seqs or len(batch.logit_rows) != num_seqs:
        return None
    if inputs.recent is not None and any(window is not None for window in inputs.recent.windows):
        return None
    return next((size for size in among if num_seqs <= size.num_seqs and longest <= size.context_len), None)


def padded(batch: Batch, size: Size, page_size: int, has_recent: bool) -> Batch:
    """A decode step on the CPU with the shapes of `size`; has_recent gives it recent tables where it has none."""
    inputs, num_seqs = batch.attention, len(batch.input_ids)
    shortest = min(range(num_seqs), key=inputs.context_lens.__getitem__)
    rows = [*range(num_seqs), *[shortest] * (size.num_seqs - num_seqs)]
    at = torch.tensor(rows)
    recent = inputs.recent
    if has_recent:
        width = -(-size.context_len // RECENT_TOKENS)
        tables, slots = torch.full((num_seqs, width), -1), torch.full((num_seqs,), -1)
        if recent is not None:
            tables[:, : recent.tables.shape[1]], slots = recent.tables, recent.slots
        recent = RecentInputs(tables[at], slots[at], (None,) * size.num_seqs)
    width = -(-size.context_len // page_size)
    tables = inputs.block_tables[at, :width]
    attention = replace(
        inputs,
        query_starts=tuple(range(size.num_seqs + 1)),
        context_lens=tuple(inputs.context_lens[row] for row in rows),
        block_tables=pad(tables, (0, width - tables.shape[1])),
        slots=inputs.slots[at],
        recent=recent,
    )
    after = None if batch.after is None else replace(batch.after, places=batch.after.places[at])
    return Batch(batch.input_ids[at], batch.positions[at], attention, torch.arange(size.num_seqs), after)


@dataclass(frozen=True)
class Graph:
    """A recorded step."""

    inputs: Batch  # what it reads: tensors of `parcel`
    parcel: Parcel  # on the device
    replay: Replay

    def run(self, step: Batch) -> Tensor:
        """The recorded step for a padded one; what it returns is overwritten by the next run of any graph."""
        refill(self.parcel, _sent(step))
        if step.after is not None:
            after = replace(step.after, places=self.parcel.tensors[-1])
            self.inputs.input_ids.copy_(after.read(self.inputs.input_ids))
        refill_tiles(self.inputs.attention, step.attention)
        return self.replay()


def _sent(step: Batch) -> list[Tensor]:
    """What goes to the device in one copy, the same for all steps of a size."""
    places = torch.zeros_like(step.input_ids) if step.after is None else step.after.places
    return [*replace(step, after=None).tensors, places]


@dataclass
class GraphRunner(Runner):
    """A runner whose decode steps are recorded."""

    model: Model
    caches: Sequence[Any]
    recorder: Recorder
    sizes: Sequence[Size]
    page_size: int
    has_recent: bool  # whether the cache has recent pages
    graphs: dict[Size, Graph] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(self.model, self.caches)
        self._logits: Tensor | None = None  # [most sequences, vocab] float32, where every graph puts its own

    @torch.inference_mode()
    def prepare(self, max_batch_tokens: int) -> None:
        """Record every size, the largest first, whose memory the others use, and run a prompt of every kernel. What
        lies in page 0 is lost."""
        for size in sorted(self.sizes, reverse=True):
            self.graphs[size] = self._recorded(size)
        for num_rows in sorted({min(rows, max_batch_tokens) for rows in (*PROMPTS, max_batch_tokens)}):
            num_pages, num_logits = -(-num_rows // self.page_size), min(num_rows, MOST_LOGITS)
            row = BatchRow([0] * num_rows, 0, [0] * num_pages, self.page_size, num_logits)
            super().run(with_recent(build_batch([row]), self.has_recent))

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """As Runner's. The logits of a recorded step are copied, 8 bytes an id: the next step may be launched before
        anybody has seen what was drawn from them, and what was not drawn is drawn from them then."""
        size = size_for(batch, self.sizes)
        if size is None:
            return super().run(batch)
        step = padded(batch, size, self.page_size, self.has_recent)
        return self.graphs[size].run(step)[: len(batch.logit_rows)].clone()

    def _recorded(self, size: Size) -> Graph:
        row = BatchRow([0], size.context_len - 1, [0] * -(-size.context_len // self.page_size), self.page_size, 1)
        step = padded(build_batch([row] * size.num_seqs), size, self.page_size, self.has_recent)
        parcel = send(_sent(step), self.caches[0].device)
        inputs = step.on(parcel.tensors[:-1])

        def forward() -> Tensor:
            logits = self.model.forward(inputs, self.caches)
            if self._logits is None:  # the first one runs before it is recorded
                self._logits = torch.empty_like(logits)
            return self._logits[: len(logits)].copy_(logits)

        return Graph(inputs, parcel, self.recorder.record(forward))


def runner_for(
    model: Decoder, caches: Sequence[Any], plan: Plan, recorder: Callable[[], Recorder] = CudaRecorder
) -> tuple[Runner, str | None]:
    """The runner of a plan, and what the start screen says where a GPU's steps cannot be recorded.

    Raises torch.OutOfMemoryError.
    """
    if plan.device != "cuda":
        return runner_of(model, caches), None
    plain = Runner(model, caches)
    others = sorted({layer.attention.kernel.name for layer in model.layers} - {"triton", "triton-fixed"})
    if others:
        return plain, f"decode steps are launched kernel by kernel: attention on {', '.join(others)} waits for the host"
    every = sizes(plan.max_num_seqs, plan.max_model_len)
    runner = GraphRunner(model, caches, recorder(), every, plan.page_size, plan.num_recent_pages > 0)
    try:
        runner.prepare(plan.max_batch_tokens)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return plain, f"decode steps are launched kernel by kernel, because they cannot be recorded: {error}"
    return runner, None


def with_recent(batch: Batch, has_recent: bool) -> Batch:
    """The same step, with recent tables that hold nothing if the cache has recent pages."""
    inputs = batch.attention
    if not has_recent:
        return batch
    tables = torch.full((len(inputs.context_lens), -(-max(inputs.context_lens) // RECENT_TOKENS)), -1)
    recent = RecentInputs(tables, torch.full_like(inputs.slots, -1), (None,) * len(inputs.context_lens))
    return replace(batch, attention=replace(inputs, recent=recent))
