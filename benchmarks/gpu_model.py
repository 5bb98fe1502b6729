"""How fast a whole model decodes on this machine's GPU:  python -m benchmarks.gpu_model [--only "decode w4" ...]

Llama-3-8B with random weights, made on the GPU: 4-bit codes in groups of 128 (w4), or bfloat16 (bf16), over caches of
float16 and of quantized pages. Nothing is read from a disk, and the host holds no weights.

decode     batches 1, 16 and 64 at contexts of 128, 8k, 32k and 64k tokens, as recorded steps. `step_ms` is the GPU's
           time of a replay (CUDA events; steps of all batches of a context take turns with a copy in device memory),
           `share` the bytes that a step must read over what the copy would move in its time, `host_us` what the host
           does for a step before it waits, `loop_ms` a step from its ids to the next ones, sampling included, by the
           host's clock. A size that does not fit in memory is left out and says so.
full       as many sequences of 32k tokens as fit, for each cache
prompt     512 and 4,096 tokens in chunks of 512, and in one
engine     16 requests through the engine's own loop, against the replays alone
fixed      the same with --kernel triton-fixed: what a result that does not depend on the batch costs

Results are added to a file, one JSON object a line, as they come (benchmarks/gpu_timing.py).
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from benchmarks.gpu_random import PAGE_SIZE, Kind, Models, plan_of
from benchmarks.gpu_timing import Case, Clock, arguments, copy_case, main_of, release
from benchmarks.shapes import SHAPES, Shape
from benchmarks.workers import Write, said
from engine.assembly import make_manager
from engine.batch import BatchRow, build_batch
from engine.core import EngineCore, Parts
from engine.graphs import CudaRecorder, GraphRunner, Recorder, Size
from engine.loading import LoadedModel
from engine.messages import Sampling, Submit, Token
from engine.runner import Runner
from engine.sampling import Draw
from kernels.attention.quantized.layout import RECENT_TOKENS
from kvcache.layout import PageLayout
from kvcache.storage import PageStorage

K4V4, K2V2 = "k4v4:w128:s4", "skvq:k2v2:w128:s4"
SPARE = 0.92  # of the memory that is free, for pages: recorded steps take the rest
ADVANCES = 64  # tokens that a context may grow by while it is timed
NUM_DRAWS_CONTEXT = 2  # tokens that a draw is told of: greedy ones look at none


@dataclass(frozen=True)
class Extent:
    """How much is timed; a test takes less."""

    shape: Shape = SHAPES["llama-3-8b"]
    batches: tuple[int, ...] = (1, 16, 64)
    contexts: tuple[int, ...] = (128, 8192, 32768, 65536)
    full_context: int = 32768
    most_full: int = 512  # sequences
    prompts: tuple[tuple[int, int], ...] = ((512, 512), (4096, 512), (4096, 4096))  # tokens, of a chunk
    requests: tuple[int, int, int] = (16, 128, 128)  # how many, tokens of a prompt, of an answer
    num_rounds: int = 9
    num_steps: int = 30  # by the host's clock


W4, BF16, FIXED = Kind("w4", 4), Kind("bf16", None), Kind("w4 fixed", 4, "triton-fixed")
RUNS = ((W4, "f16"), (W4, K4V4), (W4, K2V2), (BF16, "f16"))


# ---- caches and steps ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cache:
    """Pages for some sequences, each with pages of its own: nothing that a step reads is read twice."""

    layout: PageLayout
    pages_each: int
    recent_each: int
    num_seqs: int

    @property
    def num_bytes(self) -> int:
        each = self.pages_each * self.layout.bytes_per_page + self.recent_each * self.layout.bytes_per_recent_page
        return self.num_seqs * each

    def storage(self, device: torch.device) -> PageStorage:
        """Random where it can be: a page of equal numbers may be read faster."""
        made = PageStorage(self.layout, self.num_seqs * self.pages_each, device, self.num_seqs * self.recent_each)
        for layer in made.layers:
            pages = layer if isinstance(layer, Tensor) else layer.recent
            pages.normal_()
            if not isinstance(layer, Tensor):
                codes = layer.layout.key_parameters_at
                layer.pages[..., :codes].random_(0, 256)
                layer.pages[..., codes:] = 0x38  # scales and zeros: as e4m3 1, as float16 a half
        return made

    def row(self, index: int, start: int, num_rows: int) -> BatchRow:
        """The rows of one sequence from position `start` on."""
        table = list(range(index * self.pages_each, (index + 1) * self.pages_each))
        first, last = max(0, start - self.layout.policy.window) // RECENT_TOKENS, (start + num_rows - 1)
        wanted = sorted({0, *range(first, last // RECENT_TOKENS + 1)}) if self.recent_each else []
        held = {at: index * self.recent_each + (at and 1 + at % (self.recent_each - 1)) for at in wanted}
        return BatchRow([17] * num_rows, start, table, PAGE_SIZE, 1, held)


def cache_for(layout: PageLayout, num_seqs: int, context: int, num_rows: int = 1) -> Cache:
    recent = 0
    if layout.read_rule is not None:
        recent = 3 + -(-(layout.policy.window + num_rows) // RECENT_TOKENS)
    return Cache(layout, -(-context // PAGE_SIZE), recent, num_seqs)


class StepTimer(Protocol):
    """What times steps on the device."""

    def milliseconds(self, calls: Sequence[Case]) -> list[float]: ...

    def wait(self) -> None: ...


class DeviceTimer:
    """Calls in turns, by CUDA events."""

    def __init__(self, device: torch.device, num_rounds: int) -> None:
        self._clock = Clock(device, num_rounds)

    def milliseconds(self, calls: Sequence[Case]) -> list[float]:
        self._clock.trial(calls)
        return self._clock.trial(calls)

    def wait(self) -> None:
        self._clock.wait()


@dataclass
class Bench:
    """What every group needs."""

    extent: Extent
    device: torch.device
    timer: StepTimer
    recorder: Callable[[], Recorder] = CudaRecorder

    @cached_property
    def models(self) -> Models:
        return Models(self.extent.shape, self.device)

    @cached_property
    def copy(self) -> Case:
        return copy_case(self.device)

    @property
    def free_bytes(self) -> int:
        release()
        return int(torch.cuda.mem_get_info()[0] * SPARE)

    def decode(self, kind: Kind, policy: str, write: Write) -> None:
        loaded = self.models.loaded(kind, policy)
        for context in self.extent.contexts:
            for batch in self.extent.batches:
                facts = {"group": f"decode {kind.name} {policy}", "batch": batch, "context": context}
                self._tried(facts, write, partial(self._decoded, loaded, batch, context))

    def full(self, kind: Kind, policy: str, write: Write) -> None:
        """As many sequences as fit."""
        loaded, context = self.models.loaded(kind, policy), self.extent.full_context
        one = cache_for(loaded.layout, 1, context + ADVANCES).num_bytes
        batch = max(1, min(self.extent.most_full, self.free_bytes // one))
        facts = {"group": f"full {kind.name} {policy}", "batch": batch, "context": context}
        self._tried(facts, write, partial(self._decoded, loaded, batch, context))

    def prompt(self, kind: Kind, policy: str, write: Write) -> None:
        loaded = self.models.loaded(kind, policy)
        for num_tokens, chunk in self.extent.prompts:
            facts = {"group": f"prompt {kind.name} {policy}", "tokens": num_tokens, "chunk": chunk}
            self._tried(facts, write, partial(self._prompted, loaded, num_tokens, chunk))

    def engine(self, kind: Kind, policy: str, write: Write) -> None:
        loaded = self.models.loaded(kind, policy)
        self._tried({"group": f"engine {kind.name} {policy}"}, write, partial(self._served, loaded, kind, policy))

    def _tried(self, facts: dict[str, Any], write: Write, run: Callable[[], dict[str, Any]]) -> None:
        try:
            write(facts | run())
        except Exception as error:  # what a library or a compiler may raise, and what does not fit
            write(facts | {"error": said(error)})
            self.timer.wait()  # raises again where the device itself is broken
        release()

    def _decoded(self, loaded: LoadedModel, batch: int, context: int) -> dict[str, Any]:
        cache = cache_for(loaded.layout, batch, context + ADVANCES)
        if cache.num_bytes > self.free_bytes:
            raise MemoryError(f"the cache takes {cache.num_bytes:,} bytes, {self.free_bytes:,} are to be had")
        layers = cache.storage(self.device).layers
        size = Size(batch, context + ADVANCES)
        runner = GraphRunner(loaded.model, layers, self.recorder(), [size], PAGE_SIZE, cache.recent_each > 0)
        runner.prepare(max_batch_tokens=1)
        rows = [cache.row(i, context - 1, 1) for i in range(batch)]
        logits = runner.run(build_batch(rows))
        if not bool(logits.isfinite().all()):
            raise ValueError("the step gives logits that are not finite")
        step_bytes = sum(use.num_bytes for use in loaded.kernels) + batch * context * loaded.layout.bytes_per_token
        step = Case("step", step_bytes, runner.graphs[size].replay)
        step_ms, copy_ms = self.timer.milliseconds([step, self.copy])
        return {
            "step_ms": round(step_ms, 4),
            "tok_per_s": round(1e3 * batch / step_ms, 1),
            "step_bytes": step_bytes,
            "share": round(step_bytes / step_ms / (self.copy.num_bytes / copy_ms), 3),
            "copy_gb_per_s": round(self.copy.num_bytes / copy_ms / 1e6, 1),
            **self._by_host(loaded, runner, rows),
        }

    def _by_host(self, loaded: LoadedModel, runner: Runner, rows: Sequence[BatchRow]) -> dict[str, float]:
        """What the host does for a step before it waits, and whole steps with their draws."""
        ahead, whole = [], []
        for _ in range(self.extent.num_steps):
            started = time.perf_counter()
            logits = runner.run(build_batch(rows))
            launched = time.perf_counter()
            drawn(loaded, logits)
            ahead.append(launched - started)
            whole.append(time.perf_counter() - started)
        return {
            "host_us": round(1e6 * statistics.median(ahead), 1),
            "loop_ms": round(1e3 * statistics.median(whole), 4),
        }

    def _prompted(self, loaded: LoadedModel, num_tokens: int, chunk: int) -> dict[str, Any]:
        """By the host's clock, as such steps are launched kernel by kernel."""
        cache = cache_for(loaded.layout, 1, num_tokens, num_tokens)
        runner = Runner(loaded.model, cache.storage(self.device).layers)
        steps = [
            build_batch([cache.row(0, start, min(chunk, num_tokens - start))]) for start in range(0, num_tokens, chunk)
        ]

        def run() -> float:
            self.timer.wait()
            started = time.perf_counter()
            for step in steps:
                logits = runner.run(step)
            drawn(loaded, logits)
            return time.perf_counter() - started

        run()  # compiles
        seconds = statistics.median(run() for _ in range(self.extent.num_rounds))
        return {"ms": round(1e3 * seconds, 3), "tok_per_s": round(num_tokens / seconds, 1)}

    def _served(self, loaded: LoadedModel, kind: Kind, policy: str) -> dict[str, Any]:
        """The engine's loop over requests that all decode, and the replays of the same step alone."""
        num_requests, prompt, answer = self.extent.requests
        cache = cache_for(
            loaded.layout, num_requests, prompt + answer + PAGE_SIZE, 512
        )  # admission keeps a page to spare
        storage = cache.storage(self.device)
        plan = plan_of(kind, policy, num_requests * cache.pages_each, num_requests * cache.recent_each, num_requests)
        size = Size(num_requests, cache.pages_each * PAGE_SIZE)
        runner = GraphRunner(
            loaded.model, storage.layers, self.recorder(), [size], PAGE_SIZE, plan.num_recent_pages > 0
        )
        runner.prepare(plan.max_batch_tokens)
        manager = make_manager(plan, loaded.layout, "benchmark")
        core = EngineCore(Parts(plan, runner, storage, manager, loaded.sampler, self.extent.shape.vocab, ()))
        sampling = Sampling(max_tokens=answer, temperature=0.0, ignore_eos=True)
        core.step([Submit(str(i), [i + 1] * prompt, sampling, time.monotonic()) for i in range(num_requests)])
        while core.stats().num_waiting:
            core.step([])
        steps = []
        while core.has_work:
            started = time.perf_counter()
            num_tokens = sum(isinstance(event, Token) for event in core.step([]))
            if num_tokens == num_requests:
                steps.append(time.perf_counter() - started)
        if not steps:
            raise ValueError("the requests never decode together")
        (step_ms,) = self.timer.milliseconds([Case("step", 0, runner.graphs[size].replay)])
        engine_ms = 1e3 * statistics.median(steps)
        return {
            "batch": num_requests,
            "step_ms": round(step_ms, 4),
            "engine_ms": round(engine_ms, 4),
            "engine_tok_per_s": round(1e3 * num_requests / engine_ms, 1),
            "share_of_bare": round(step_ms / engine_ms, 3),
        }


def drawn(loaded: LoadedModel, logits: Tensor) -> list[Any]:
    """The ids of a step, greedy: waits for them."""
    sampling = Sampling(max_tokens=1 << 20, temperature=0.0)
    draw = Draw(sampling, 0, 0, [0] * NUM_DRAWS_CONTEXT, 1, ())
    found = loaded.sampler.launch(logits, [(row, draw) for row in range(len(logits))]).read()
    return list(found.drawn)


def groups(bench: Bench) -> dict[str, Callable[[Write], None]]:
    """Models of one kind follow each other."""

    def of(verb: str, runs: Sequence[tuple[Kind, str]]) -> Iterator[tuple[str, Callable[[Write], None]]]:
        for kind, policy in runs:
            yield f"{verb} {kind.name} {policy}", partial(getattr(bench, verb), kind, policy)

    quantized = [run for run in RUNS if run[0] is W4]
    dense = [run for run in RUNS if run[0] is BF16]
    found = [*of("decode", quantized), *of("prompt", quantized), *of("engine", [(W4, K4V4)]), *of("full", quantized)]
    found += [*of("decode", dense), *of("prompt", dense), *of("engine", dense)]
    found += [*of("decode", [(FIXED, K4V4)]), *of("prompt", [(FIXED, K4V4)])]
    return dict(found)


def names() -> list[str]:
    """Of the groups."""
    return list(groups(Bench(Extent(), torch.device("cuda"), cast(StepTimer, None))))


def on_gpu(device: torch.device) -> dict[str, Callable[[Write], None]]:
    extent = Extent()
    return groups(Bench(extent, device, DeviceTimer(device, extent.num_rounds)))


def main() -> None:
    options = arguments(__doc__, seconds=570).parse_args()

    def start() -> Callable[[str], Callable[[Write], None]]:
        every = on_gpu(torch.device("cuda"))
        return lambda name: every[name]

    main_of("benchmarks.gpu_model", options, names(), start)


if __name__ == "__main__":
    main()
