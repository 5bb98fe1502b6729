"""How fast attention reads a quantized cache, against our own float16 pages:  python -m benchmarks.kv_speed [--json]

One layer's call of the native kernels at several contexts and policies, Hadamard transforms, a window of 128 tokens and
4 sinks: a decode step, and the last rows of a prompt over a history that is packed. All policies take turns, call by
call. Each has copies of its cache, more than the last cache of the machine holds, so that pages come from memory as
they do in a model. A trial's time is the least of its calls, its ratio float16's time over a policy's; what is told is
the median of the trials, with the lowest and the highest ratio.

Bytes are those of the pages that a call must read, and their rate is told as a share of the bandwidth that the machine
reads with as many threads, the median of probes before and after every group. `--json` prints no table; the last line
is JSON either way.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.machine import GIGA, cpu_name, measure_roof
from benchmarks.shapes import SHAPES, Shape
from engine.batch import BatchRow, build_batch
from engine.machine import num_cores
from kernels import native
from kernels.attention.f16.layout import page_shape
from kernels.attention.f16.native import F16Native
from kernels.attention.quantized.cache import QuantizedCache, recent_page_shape
from kernels.attention.quantized.layout import RECENT_TOKENS, ChunkLayout
from kernels.attention.quantized.native import QuantizedNative
from kernels.contract import AttentionInputs
from kvcache.codecs import uncalibrated_codec
from kvcache.policy import read_policy
from kvcache.storage import zeros

CPU = torch.device("cpu")
MODELS = ("llama-3.2-1b", "llama-3-8b")
POLICIES = ("k8v8", "k4v4", "skvq:k4v2", "skvq:k2v2", "skvq:k2v1.5")
PAGE_SIZE, WINDOW, SINKS = 64, 128, 4  # tokens
CHUNK = 512  # tokens stored at a time
NUM_RECENT = (WINDOW + CHUNK) // RECENT_TOKENS + 2  # pages beside that of the sinks
MIN_COPIES_BYTES = 64 << 20  # of the copies of one policy
SECONDS = 0.15  # of one trial's calls, all policies together; at least 3 rounds


@dataclass(frozen=True)
class Case:
    """One policy's call."""

    policy: str
    num_bytes: int  # that the call must read
    calls: Sequence[Callable[[], object]]  # the same work on memory of their own


@dataclass(frozen=True)
class Result:
    model: str
    context: int
    num_rows: int
    policy: str
    microseconds: float  # median of the trials
    megabytes: float
    share: float  # of the bandwidth
    against_f16: float  # median, lowest, highest of the trials
    lowest: float
    highest: float


@dataclass(frozen=True)
class Work:
    """The last `num_rows` tokens of a sequence of `context`."""

    shape: Shape
    context: int
    num_rows: int

    def last(self) -> AttentionInputs:
        return self.inputs(self.context - self.num_rows, self.context)

    def inputs(self, start: int, stop: int) -> AttentionInputs:
        """Of positions start to stop - 1, at most CHUNK: pages of rising ids, and the recent pages that they write or
        read, which later positions use again."""
        read = [*range(min(SINKS, stop)), *range(max(0, start - WINDOW + 1), stop)]
        recent = {at: at and 1 + at % NUM_RECENT for at in (position // RECENT_TOKENS for position in read)}
        row = BatchRow([0] * (stop - start), start, list(range(self.num_pages)), PAGE_SIZE, 0, recent)
        return build_batch([row]).attention

    def store(self, store: Callable[[Tensor, Tensor, AttentionInputs], None]) -> None:
        """Random keys and values at all positions."""
        heads = self.shape.num_kv_heads
        for start in range(0, self.context, CHUNK):
            rows = min(CHUNK, self.context - start)
            store(self.rows(rows, heads), self.rows(rows, heads), self.inputs(start, start + rows))

    @property
    def num_pages(self) -> int:
        return -(-self.context // PAGE_SIZE)

    def rows(self, num_rows: int, num_heads: int) -> Tensor:
        return torch.randn(num_rows, num_heads, self.shape.head_dim)


def float_case(work: Work) -> Case:
    kernel, heads, dim = F16Native(), work.shape.num_kv_heads, work.shape.head_dim
    pages = zeros((work.num_pages, *page_shape(heads, PAGE_SIZE, dim)), torch.float16, CPU)
    work.store(lambda k, v, inputs: kernel.store(k, v, pages, inputs))
    q, inputs = work.rows(work.num_rows, work.shape.num_heads), work.last()
    calls = [partial(kernel.attend, q, own, inputs, dim**-0.5) for own in copies(pages, num_copies(pages.nbytes))]
    return Case("f16", heads * work.context * 4 * dim, calls)


def quantized_case(work: Work, policy: str) -> Case:
    kernel, heads, dim = QuantizedNative(), work.shape.num_kv_heads, work.shape.head_dim
    layer = read_policy(f"{policy}:w{WINDOW}:s{SINKS}").layers(1, dim)[0]
    codec = uncalibrated_codec(layer, heads, dim)
    layout = ChunkLayout(codec.keys.layout, codec.values.layout, PAGE_SIZE)
    pages = zeros((work.num_pages, heads, layout.chunk_bytes), torch.uint8, CPU)
    recent = zeros((1 + NUM_RECENT, *recent_page_shape(heads, dim)), torch.float16, CPU)
    cache = QuantizedCache(codec, layout, pages, recent)
    work.store(lambda k, v, inputs: kernel.store(k, v, cache, inputs))
    q, inputs, count = work.rows(work.num_rows, work.shape.num_heads), work.last(), num_copies(pages.nbytes)
    memory = zip(copies(pages, count), copies(recent, count), strict=True)
    caches = [QuantizedCache(codec, layout, *own) for own in memory]
    calls = [partial(kernel.attend, q, own, inputs, dim**-0.5) for own in caches]
    num_high = min(WINDOW + SINKS + work.num_rows - 1, work.context)
    return Case(policy, heads * ((work.context - num_high) * layout.token_bytes + num_high * 4 * dim), calls)


def num_copies(num_bytes: int) -> int:
    return max(2, math.ceil(MIN_COPIES_BYTES / num_bytes))


def copies(pages: Tensor, count: int) -> list[Tensor]:
    """In one piece of memory, so that short ones have huge pages too."""
    return list(zeros((count, *pages.shape), pages.dtype, CPU).copy_(pages).unbind())


def trial_seconds(cases: Sequence[Case]) -> list[float]:
    """The least time of each case, which take turns call by call."""
    least, stop, done = [math.inf] * len(cases), time.perf_counter() + SECONDS, 0
    while done < 3 or time.perf_counter() < stop:
        for i, case in enumerate(cases):
            call = case.calls[done % len(case.calls)]
            start = time.perf_counter()
            call()
            least[i] = min(least[i], time.perf_counter() - start)
        done += 1
    return least


def judged(
    cases: Sequence[Case], trials: Sequence[Sequence[float]], model: str, work: Work, read: float
) -> list[Result]:
    """read: GB/s that the machine reads; the first case is what the others are held against."""
    results = []
    for i, case in enumerate(cases):
        seconds = statistics.median(trial[i] for trial in trials)
        ratios = [trial[0] / trial[i] for trial in trials]
        spread = (statistics.median(ratios), min(ratios), max(ratios))
        share = case.num_bytes / seconds / GIGA / read
        results.append(
            Result(
                model,
                work.context,
                work.num_rows,
                case.policy,
                round(1e6 * seconds, 1),
                round(case.num_bytes / 1e6, 3),
                round(share, 3),
                *(round(x, 2) for x in spread),
            )
        )
    return results


def measured(model: str, work: Work, args: argparse.Namespace) -> list[Result]:
    cases = [float_case(work), *(quantized_case(work, policy) for policy in args.policies)]
    reads = [measure_roof(args.threads).read_all]
    trial_seconds(cases)  # the first calls prepare the step
    trials = [trial_seconds(cases) for _ in range(args.trials)]
    reads.append(measure_roof(args.threads).read_all)
    return judged(cases, trials, model, work, statistics.median(reads))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=MODELS, help="whose heads")
    parser.add_argument("--policies", nargs="*", default=POLICIES)
    parser.add_argument("--contexts", type=int, nargs="*", default=[1024, 4096, 16384, 32768])
    parser.add_argument("--prefill", type=int, nargs="*", default=[4096], help="contexts of prompts")
    parser.add_argument("--rows", type=int, default=128, help="last rows of a prompt")
    parser.add_argument("--trials", type=int, default=7)
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--json", action="store_true", help="no table")
    args = parser.parse_args()
    if native.MISSING is not None:
        raise SystemExit(native.MISSING)
    torch.set_num_threads(1)  # torch only allocates here
    native.set_num_threads(args.threads)
    results = []
    for model in args.models:
        works = [Work(SHAPES[model], context, 1) for context in args.contexts]
        works += [Work(SHAPES[model], context, args.rows) for context in args.prefill]
        for work in works:
            found = measured(model, work, args)
            results += found
            if not args.json:
                print(f"{model}: {work.context} tokens, {work.num_rows} rows")
                print("\n".join(map(line, found)), flush=True)
    output = {"benchmark": "kv_speed", "cpu": cpu_name(), "isa": native.isa(), "threads": args.threads}
    print(json.dumps(output | {"results": [asdict(result) for result in results]}))


def line(result: Result) -> str:
    return (
        f"  {result.policy:12} {result.microseconds:9.1f} us {result.megabytes:8.2f} MB {100 * result.share:4.0f} %"
        f"  {result.against_f16:5.2f} x f16 ({result.lowest:.2f} to {result.highest:.2f})"
    )


if __name__ == "__main__":
    main()
