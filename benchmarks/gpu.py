"""How fast the Triton kernels are on this machine's GPU:  python -m benchmarks.gpu [--json] [--model llama-3-8b]

One layer's matrices at several numbers of rows, decode attention at several contexts, ops on rows and sampling,
beside what torch offers for the same work: bfloat16 products, its 4-bit product, scaled dot product attention, logits
sorted or only copied to the CPU; and a copy in device memory, which says what bandwidth there is. All of a group take
turns, call by call; before each call 512 MB are written, so that nothing it reads lies in the L2 cache and the host
is ahead of the GPU. Times are from CUDA events; a trial's time is the median of its rounds, its ratio the first
case's time over a case's, and what is told is the median of the trials with the lowest and the highest ratio. Bytes
are those that a call must read and write.

Without a CUDA device it ends with a message: benchmarks.gpu_instructions says what can be known then.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.shapes import SHAPES, Shape
from engine.batch import BatchRow, build_batch
from kernels import gpu
from kernels.activation.gpu import ActivationTriton
from kernels.attention.f16.gpu import F16Triton
from kernels.attention.f16.layout import page_shape
from kernels.attention.quantized.cache import QuantizedCache, recent_page_shape
from kernels.attention.quantized.gpu import QuantizedTriton
from kernels.attention.quantized.layout import ChunkLayout
from kernels.contract import Filters, RowDraw
from kernels.linear.affine.gpu import AffineTriton
from kernels.linear.affine.layout import AffineWeights
from kernels.norm.gpu import NormTriton
from kernels.sampling.gpu import SamplingTriton
from kvcache.codecs import uncalibrated_codec
from kvcache.policy import read_policy

MODELS = ("llama-3.2-1b", "llama-3-8b")
WIDTHS = {"w4 g128": (4, 128), "w2 g64": (2, 64), "w8 row": (8, 0)}
ROWS = (1, 4, 16, 64, 512)
CONTEXTS = (4096, 32768)
BATCH = 8  # sequences of a decode step
POLICIES = ("k4v4:w128:s4", "skvq:k2v2:w128:s4")
SAMPLERS = {
    "greedy": None,
    "temperature": Filters(1.0),
    "top-k 50": Filters(1.0, top_k=50),
    "top-k 50, top-p 0.9": Filters(1.0, top_k=50, top_p=0.9),
}
PAGE_SIZE = 64  # tokens
FLUSH_BYTES = 512 << 20
COPY_BYTES = 512 << 20
ROUNDS = 9


@dataclass(frozen=True)
class Case:
    name: str
    num_bytes: int  # that a call must read and write
    call: Callable[[], object]


@dataclass(frozen=True)
class Result:
    group: str
    name: str
    microseconds: float  # median of the trials
    gigabytes_per_second: float
    share: float  # of the group's copy
    ratio: float  # the first case's time over this one's: median, lowest, highest
    lowest: float
    highest: float


class Clock:
    """Times calls by CUDA events, with a cold L2 cache."""

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)

    def trial(self, cases: Sequence[Case]) -> list[float]:
        """Median milliseconds of each case over ROUNDS rounds in turns."""
        event: Any = torch.cuda.Event
        events: list[list[tuple[Any, Any]]] = [[] for _ in cases]
        for _ in range(ROUNDS):
            for case, pairs in zip(cases, events, strict=True):
                start, stop = (event(enable_timing=True) for _ in range(2))
                self._flush.zero_()
                start.record()
                case.call()
                stop.record()
                pairs.append((start, stop))
        torch.cuda.synchronize()
        return [statistics.median(start.elapsed_time(stop) for start, stop in pairs) for pairs in events]


def copy_case(device: torch.device) -> Case:
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    return Case("copy", 2 * COPY_BYTES, partial(torch.empty_like(source).copy_, source))


def linear_cases(shape: tuple[int, int], num_rows: int, device: torch.device) -> Iterator[Case]:
    """(outputs, inputs); random codes, for speed does not depend on them."""
    n, k = shape
    x = torch.randn(num_rows, k, device=device).bfloat16()
    traffic = 2 * num_rows * (n + k)
    weight = torch.randn(n, k, device=device).bfloat16()
    yield Case("torch bf16", 2 * n * k + traffic, partial(functional.linear, x, weight))
    kernel = AffineTriton()
    for name, (bits, group) in WIDTHS.items():
        groups = k // group if group else 1
        weights = AffineWeights(
            bits,
            k,
            group or k,
            torch.randint(0, 256, (n, k * bits // 8), dtype=torch.uint8, device=device),
            torch.rand(n, groups, device=device).half(),
            torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8, device=device),
        )
        packed = kernel.prepare(weights)
        yield Case(name, packed.num_bytes + traffic, partial(kernel.linear, x, kernel.join([packed])))
    yield Case("torch int4 g128", n * k // 2 + n * k // 128 * 4 + traffic, torch_int4(x, n, k))


def torch_int4(x: Tensor, n: int, k: int) -> Callable[[], object]:
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=x.device)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    parameters = torch.rand(k // 128, n, 2, device=x.device).bfloat16()
    return partial(torch.ops.aten._weight_int4pack_mm, x, packed, 128, parameters)


def attention_cases(shape: Shape, context: int, device: torch.device) -> Iterator[Case]:
    """One decode step of BATCH sequences. Pages are zeros, which cost what others cost."""
    heads, kv, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    q = torch.randn(BATCH, heads, dim, device=device).bfloat16()
    k, v = (torch.zeros(BATCH, kv, context, dim, dtype=torch.bfloat16, device=device) for _ in range(2))
    sdpa = partial(functional.scaled_dot_product_attention, q[:, :, None], k, v, enable_gqa=True)
    yield Case("torch sdpa bf16", BATCH * kv * context * 4 * dim, sdpa)
    pages_each = context // PAGE_SIZE
    pages = torch.zeros(BATCH * pages_each, *page_shape(kv, PAGE_SIZE, dim), dtype=torch.float16, device=device)
    step = build_batch([_row(i, context, pages_each, {}) for i in range(BATCH)]).to(device).attention
    yield Case("f16 pages", pages.nbytes, partial(F16Triton().attend, q, pages, step, dim**-0.5))
    for policy in POLICIES:
        layer = read_policy(policy).layers(1, dim)[0]
        codec = uncalibrated_codec(layer, kv, dim).to(device)
        layout = ChunkLayout(codec.keys.layout, codec.values.layout, PAGE_SIZE)
        chunks = torch.zeros(BATCH * pages_each, kv, layout.chunk_bytes, dtype=torch.uint8, device=device)
        high = [0, *range((context - codec.window) // 16, context // 16)]  # recent pages: the sinks' and the window's
        recent = torch.zeros(BATCH * len(high), *recent_page_shape(kv, dim), dtype=torch.float16, device=device)
        cache = QuantizedCache(codec, layout, chunks, recent)
        tables = [{at: i * len(high) + j for j, at in enumerate(high)} for i in range(BATCH)]
        step = build_batch([_row(i, context, pages_each, tables[i]) for i in range(BATCH)]).to(device).attention
        yield Case(policy, chunks.nbytes + recent.nbytes, partial(QuantizedTriton().attend, q, cache, step, dim**-0.5))


def _row(index: int, context: int, num_pages: int, recent: dict[int, int]) -> BatchRow:
    return BatchRow([0], context - 1, list(range(index * num_pages, (index + 1) * num_pages)), PAGE_SIZE, 1, recent)


def row_cases(shape: Shape, num_rows: int, device: torch.device) -> Iterator[Case]:
    x = torch.randn(num_rows, shape.hidden, device=device).bfloat16()
    gate = torch.randn(num_rows, shape.intermediate, device=device).bfloat16()
    weight = x[0].clone()
    yield Case("torch rms_norm", 4 * x.numel(), partial(functional.rms_norm, x, (shape.hidden,), weight, 1e-5))
    yield Case("rms_norm", 4 * x.numel(), partial(NormTriton().rms_norm, x, weight, 1e-5))
    yield Case("rms_norm of a sum", 8 * x.numel(), partial(NormTriton().add_rms_norm, x, x, weight, 1e-5))
    yield Case("swiglu", 6 * gate.numel(), partial(ActivationTriton().swiglu, gate, gate))


def sampling_cases(shape: Shape, num_rows: int, device: torch.device) -> Iterator[Case]:
    """A draw from each row. All must read the logits once."""
    logits = 2 * torch.randn(num_rows, shape.vocab, device=device)
    yield Case("logits to the CPU", logits.nbytes, logits.cpu)
    yield Case("torch sort", logits.nbytes, partial(torch.sort, logits, descending=True, stable=True))
    yield Case("torch argmax", logits.nbytes, partial(torch.argmax, logits, dim=-1))
    kernel = SamplingTriton()
    for name, filters in SAMPLERS.items():
        draws = [RowDraw(row, filters, 0.4) for row in range(num_rows)]
        yield Case(name, logits.nbytes, partial(kernel.draw_all, logits, draws))


def judged(group: str, cases: Sequence[Case], trials: Sequence[Sequence[float]]) -> list[Result]:
    """trials: milliseconds by case. The first case is what the others are held against, the last one the copy."""
    milliseconds = [statistics.median(times) for times in zip(*trials, strict=True)]
    rates = [case.num_bytes / spent / 1e6 for case, spent in zip(cases, milliseconds, strict=True)]
    results = []
    for i, case in enumerate(cases):
        ratios = [times[0] / times[i] for times in trials]
        spread = (round(x, 2) for x in (statistics.median(ratios), min(ratios), max(ratios)))
        figures = (round(1e3 * milliseconds[i], 1), round(rates[i], 1), round(rates[i] / rates[-1], 3))
        results.append(Result(group, case.name, *figures, *spread))
    return results


def groups(shape: Shape, device: torch.device) -> Iterator[tuple[str, list[Case]]]:
    sizes = sorted(set(shape.linears().values()))
    for size in sizes:
        for num_rows in ROWS:
            yield f"{size[0]} x {size[1]}, {num_rows} rows", list(linear_cases(size, num_rows, device))
    for context in CONTEXTS:
        yield f"attention, {BATCH} sequences of {context}", list(attention_cases(shape, context, device))
    for num_rows in (1, 512):
        yield f"ops on {num_rows} rows", list(row_cases(shape, num_rows, device))
    for num_rows in (1, 64):
        yield f"sampling, {num_rows} of {shape.vocab:,} ids", list(sampling_cases(shape, num_rows, device))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="llama-3-8b")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="no table")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device, and there is nothing to time without one: see docs/gpu.md")
    device = torch.device("cuda")
    if (reason := gpu.refusal(device, torch.bfloat16)) is not None:
        raise SystemExit(reason)
    clock, copy = Clock(device), copy_case(device)
    every: list[Result] = []
    for name, cases in groups(SHAPES[options.model], device):
        cases.append(copy)
        clock.trial(cases)  # compiles
        found = judged(name, cases, [clock.trial(cases) for _ in range(options.trials)])
        every += found
        for result in () if options.json else found:
            print(
                f"{result.group:32} {result.name:20} {result.microseconds:9.1f} us {100 * result.share:4.0f} % of copy "
                f"{result.ratio:6.2f}x ({result.lowest:.2f} to {result.highest:.2f})",
                flush=True,
            )
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(json.dumps(machine | {"results": [asdict(result) for result in every]}))


if __name__ == "__main__":
    main()
