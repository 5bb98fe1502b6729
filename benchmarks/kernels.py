"""How near the kernels come to what the machine can do:  python -m benchmarks.kernels [--shape llama-3.2-1b] [--json]

Every kernel of a step, by itself, on the sizes of a public model: the linear layers at each width and group, the head
in 8 bits, attention at several contexts, norm, RoPE and SwiGLU. A time is the median over calls that take turns on
copies of the weights, more of them than the last cache holds, so that weights come from memory as they do in a model.

The share is that of the limit which binds: the time that reading the bytes (at the bandwidth measured) or doing the
operations (at the peak measured) takes at least, over the time taken. Operations on rows read what the caches hold and
may pass 1; at one token their time is the overhead of a call. Limits are measured before and after every group of
kernels. `--json` prints no table; the last line is JSON either way.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import kernels.activation
import kernels.attention.registry
import kernels.linear.registry
import kernels.norm
import kernels.rope
from benchmarks.machine import Roof, cpu_name, measure_roof, median_roof
from benchmarks.shapes import SHAPES, Shape
from engine.loading import HEAD_GROUP
from engine.machine import num_cores
from kernels import native
from kernels.attention.f16.layout import page_shape
from kernels.contract import AttentionInputs, AttentionSpec, LinearSpec, RowSpec, select
from kernels.linear.affine.layout import AffineWeights
from kvcache.storage import zeros

if native.MISSING is None or TYPE_CHECKING:
    from kernels.native import _native

CPU = torch.device("cpu")
PAGE_SIZE = 16  # tokens
MIN_SECONDS = 0.25  # of calls that count, at least
MIN_CALLS = 5
MAX_COPIES = 64
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
ASSUMED_CACHE = 64 << 20  # bytes, where the system does not say
GIGA = 1e9


@dataclass(frozen=True)
class Case:
    """One kernel on one size."""

    what: str
    num_tokens: int
    num_bytes: float  # that a call must read and write, once each
    operations: float  # a product and a sum are two
    peak: str  # what does them: "dot" (int8 dot products) or "fma" (float32)
    calls: list[Callable[[], object]]  # the same work on memory of their own


@dataclass(frozen=True)
class Limits:
    """What the machine did around a group of kernels, all threads, in 10^9 a second."""

    read: float  # bytes
    dot: float  # operations
    fma: float


@dataclass(frozen=True)
class Result:
    what: str
    num_tokens: int
    seconds: float
    gb_per_s: float
    gop_per_s: float
    share: float  # of the limit that binds
    limit: str  # "read", "dot" or "fma"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--bits", type=int, nargs="*", default=[2, 3, 4, 5, 6, 8])
    parser.add_argument("--groups", type=int, nargs="*", default=[32, 64, 128])
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 8, 128, 512])
    parser.add_argument("--contexts", type=int, nargs="*", default=[1024, 4096, 16384])
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--json", action="store_true", help="no table")
    args = parser.parse_args()
    if native.MISSING is not None:
        raise SystemExit(native.MISSING)
    torch.set_num_threads(1)  # torch only allocates here
    native.set_num_threads(args.threads)
    shape, tokens = SHAPES[args.shape], args.tokens
    groups: list[Iterator[Case]] = [
        linear_cases(shape, bits, group, tokens) for bits in args.bits for group in args.groups
    ]
    groups += [head_cases(shape, tokens), attention_cases(shape, args.contexts), row_cases(shape, tokens)]
    roofs: list[Roof] = []
    results: list[Result] = []
    for cases in groups:
        seconds, limits = measured(cases, args.threads, roofs)
        results += [judged(case, median, limits) for case, median in seconds]
        if not args.json:
            for result in results[-len(seconds) :]:
                print(line(result), flush=True)
    roof = median_roof(roofs)
    output = {
        "benchmark": "kernels",
        "cpu": cpu_name(),
        "isa": native.isa(),
        "threads": args.threads,
        "shape": args.shape,
        "read_gb_per_s": roof.read_all,
        "dot_gop_per_s": roof.dot_all,
        "results": [vars(result) for result in results],
    }
    print(json.dumps(output))


def measured(cases: Iterator[Case], num_threads: int, roofs: list[Roof]) -> tuple[list[tuple[Case, float]], Limits]:
    """Median seconds of each case, and the limits before and after them, averaged; `roofs` collects these."""
    before, fma_before = measure_roof(num_threads), _native.fma_peak(num_threads)
    seconds = [(case, median_seconds(case.calls)) for case in cases]
    after, fma_after = measure_roof(num_threads), _native.fma_peak(num_threads)
    roofs += [before, after]
    read, dot = (before.read_all + after.read_all) / 2, (before.dot_all + after.dot_all) / 2
    return seconds, Limits(read, dot, (fma_before + fma_after) / 2 / GIGA)


def median_seconds(calls: list[Callable[[], object]]) -> float:
    """Of one call, once every one of them has run."""
    for call in calls:
        call()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < MIN_CALLS or time.perf_counter() - started < MIN_SECONDS:
        before = time.perf_counter()
        calls[len(times) % len(calls)]()
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def judged(case: Case, seconds: float, limits: Limits) -> Result:
    peak = {"dot": limits.dot, "fma": limits.fma}[case.peak]
    reading, computing = case.num_bytes / GIGA / limits.read, case.operations / GIGA / peak
    return Result(
        what=case.what,
        num_tokens=case.num_tokens,
        seconds=seconds,
        gb_per_s=case.num_bytes / GIGA / seconds,
        gop_per_s=case.operations / GIGA / seconds,
        share=max(reading, computing) / seconds,
        limit="read" if reading >= computing else case.peak,
    )


def line(result: Result) -> str:
    return (
        f"{result.what:<28} {result.num_tokens:>4} tokens {result.seconds * 1e6:>10.1f} us {result.gb_per_s:>7.1f} GB/s"
        f" {result.gop_per_s:>8.1f} GOP/s   {result.share:>5.2f} of {result.limit}"
    )


def num_copies(num_bytes: float) -> int:
    """Of weights of that size, so that all of them together are three times the last cache."""
    sizes = [path.read_text().strip() for path in CACHES.glob("index*/size")]  # "32768K"
    last_cache = max((int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=ASSUMED_CACHE)
    return min(MAX_COPIES, max(2, int(3 * last_cache / num_bytes) + 1))


# -- what is measured ----------------------------------------------------------------------------------------------


def random_affine(bits: int, group: int, num_rows: int, num_channels: int) -> AffineWeights:
    """Codes of random bits and, as most checkpoints have it, one zero point for all."""
    codes = torch.randint(0, 256, (num_rows, -(-num_channels * bits // 8)), dtype=torch.uint8)
    num_groups = -(-num_channels // group)
    scales = (torch.rand(num_rows, num_groups) + 0.5).half()
    zeros = torch.tensor([[2 ** (bits - 1)]], dtype=torch.uint8).expand(num_rows, num_groups)
    return AffineWeights(bits, num_channels, group, codes, scales, zeros)


def joined_cases(what: str, all_weights: list[AffineWeights], tokens: list[int]) -> Iterator[Case]:
    """Matrices that read the same input, as a layer multiplies them."""
    first = all_weights[0]
    rows = sum(weights.out_features for weights in all_weights)
    spec = LinearSpec(first.in_features, rows, CPU, torch.float32, first.describe(), first.bits, first.group_size)
    kernel = select(kernels.linear.registry.kernels_for("affine"), spec, only="native").kernel
    weight_bytes = rows * (first.in_features * first.bits / 8 + first.num_groups * first.scales.element_size())
    copies = [[kernel.prepare(weights) for weights in all_weights] for _ in range(num_copies(weight_bytes))]
    joined = [kernel.join(copy) for copy in copies]
    for num_tokens in tokens:
        x = torch.randn(num_tokens, first.in_features)
        calls: list[Callable[[], object]] = [partial(kernel.linear, x, one) for one in joined]
        moved = weight_bytes + 4 * num_tokens * (first.in_features + rows)
        yield Case(what, num_tokens, moved, 2.0 * num_tokens * rows * first.in_features, "dot", calls)


def linear_cases(shape: Shape, bits: int, group: int, tokens: list[int]) -> Iterator[Case]:
    """The matrices of one layer, those that read the same input in one call."""
    sizes = shape.linears()
    for roles in (("q", "k", "v"), ("o",), ("gate", "up"), ("down",)):
        weights = [random_affine(bits, group, *sizes[role]) for role in roles]
        yield from joined_cases(f"{'+'.join(roles)} {weights[0].describe()}", weights, tokens)


def head_cases(shape: Shape, tokens: list[int]) -> Iterator[Case]:
    """The output head, rounded to 8 bits; only rows that choose a token go through it, so never a whole prompt."""
    weights = [random_affine(8, HEAD_GROUP, shape.vocab, shape.hidden)]
    yield from joined_cases(f"head {weights[0].describe()}", weights, [count for count in tokens if count <= 8])


def attention_cases(shape: Shape, contexts: list[int]) -> Iterator[Case]:
    """One sequence that decodes, over pages of float16 in shuffled order."""
    spec = AttentionSpec(
        shape.num_heads, shape.num_kv_heads, shape.head_dim, PAGE_SIZE, CPU, torch.float32, torch.float16
    )
    kernel = select(kernels.attention.registry.kernels_for("f16"), spec, only="native").kernel
    for context in contexts:
        num_pages = -(-context // PAGE_SIZE)
        table = torch.randperm(num_pages)
        slot = table[(context - 1) // PAGE_SIZE] * PAGE_SIZE + (context - 1) % PAGE_SIZE
        inputs = AttentionInputs((0, 1), (context,), table.unsqueeze(0), slot.unsqueeze(0))
        page = page_shape(shape.num_kv_heads, PAGE_SIZE, shape.head_dim)
        read = 2.0 * 2 * context * shape.num_kv_heads * shape.head_dim
        layers = [zeros((num_pages, *page), torch.float16, CPU) for _ in range(num_copies(read))]  # in huge pages
        for pages in layers:
            pages.copy_(torch.rand(pages.shape))
        q = torch.randn(1, shape.num_heads, shape.head_dim)
        calls: list[Callable[[], object]] = [
            partial(kernel.attend, q, pages, inputs, shape.head_dim**-0.5) for pages in layers
        ]
        operations = 4.0 * context * shape.num_heads * shape.head_dim
        yield Case(f"attention f16 at {context}", 1, read, operations, "fma", calls)


def row_cases(shape: Shape, tokens: list[int]) -> Iterator[Case]:
    """What stands between the matrices: one memory, which the caches hold as they do in a step."""
    spec = RowSpec(shape.hidden, CPU, torch.float32)
    norm = select(kernels.norm.KERNELS, spec, only="native").kernel
    rope = select(kernels.rope.KERNELS, spec, only="native").kernel
    gate = select(kernels.activation.KERNELS, spec, only="native").kernel
    weight = torch.randn(shape.hidden)
    for count in tokens:
        x, delta = torch.randn(count, shape.hidden), torch.randn(count, shape.hidden)
        q = torch.randn(count, shape.num_heads, shape.head_dim)
        k = torch.randn(count, shape.num_kv_heads, shape.head_dim)
        cos, sin = torch.rand(2, count, shape.head_dim // 2).unbind()
        wide = torch.randn(count, shape.intermediate)
        heads = q.numel() + k.numel()
        ops: list[tuple[str, int, int, Callable[[], object]]] = [
            ("add + norm", 16 * x.numel(), 5 * x.numel(), partial(norm.add_rms_norm, x, delta, weight, 1e-5)),
            ("rope of q and k", 8 * heads, 3 * heads, partial(rope.rotate_pair, q, k, cos, sin)),
            ("swiglu", 12 * wide.numel(), 20 * wide.numel(), partial(gate.swiglu, wide, wide)),
        ]
        for what, num_bytes, operations, call in ops:
            yield Case(what, count, num_bytes, operations, "fma", [call])


if __name__ == "__main__":
    main()
