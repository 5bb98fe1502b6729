"""Whether the Triton kernels are right on this machine's GPU:  python -m benchmarks.gpu_check

At the sizes of Llama-3-8B:

linear       every kind of codes at every entry of the table of configurations, against float64
families     fp8, int8, codebook, lookup, sparse, lowrank and dense weights, likewise
ops          RMSNorm, RoPE and SwiGLU, likewise
transforms   roundings, Hadamard blocks and rotations of activations, against the same on the CPU
store        what is written to pages, behind RoPE and alone, against the reference: the same to the last bit
attention    a sweep of widths, heads and page sizes (benchmarks.gpu_attention), and contexts of up to 32k tokens
far          a layer's last pages, where offsets do not fit 32 bits: prompts and decode steps
steps        recorded decode steps of a small model, against the same launched kernel by kernel
sampling     ids drawn from 128,256, against the reference's

A result's error is told in parts of the bound of the tests (tests/tolerance.py): above 1 it is wrong. Lines of JSON as
benchmarks.gpu writes them; ends with an error where one is wrong. On a CPU under TRITON_INTERPRET=1 for a test, small.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import PAGE_SIZE, Attended
from benchmarks.gpu_attention import HEADS, SCALE, WIDTHS, Sweep
from benchmarks.gpu_errors import Checked, placed, worst
from benchmarks.gpu_model import K4V4, W4, cache_for
from benchmarks.gpu_pages import check_far_pages, check_stored
from benchmarks.gpu_random import Models
from benchmarks.gpu_timing import arguments, main_of
from benchmarks.gpu_transforms import check_transforms
from benchmarks.shapes import SHAPES, Shape
from benchmarks.workers import Line, Write, lines_of
from engine.batch import BatchRow, build_batch
from engine.graphs import CudaRecorder, GraphRunner, Size
from engine.runner import Runner
from kernels.activation.gpu import ActivationTriton
from kernels.attention.f16.gpu import F16Triton
from kernels.attention.f16.layout import page_shape
from kernels.contract import AttentionInputs, Filters, RowDraw
from kernels.gpu.multiply import multiply
from kernels.gpu.packing import LINEAR, LOOKUP, Packed
from kernels.linear.affine.gpu import AffineTriton
from kernels.linear.registry import kernels_for
from kernels.linear.table import tables
from kernels.linear.table.gpu import TableTriton
from kernels.norm.gpu import NormTriton
from kernels.rope.gpu import RopeTriton
from kernels.sampling.gpu import SamplingTriton
from kernels.sampling.reference import SamplingReference
from kvcache.storage import PageStorage
from tests.kernels.attention_oracle import random_tokens
from tests.kernels.interpreted_attention import exact_attention
from tests.kernels.weights import example, random_affine, random_nested, random_table
from tests.tolerance import EPS, dot_bound

EPS_BF16 = torch.finfo(torch.bfloat16).eps
FAR_BYTES = (5 << 30, 9 << 30)  # more than 2^31 elements of float16 pages, and words of packed ones
SMALL = Shape(256, 512, 2, 8, 2, 64, 1024, False)
FAMILIES = ("dense", "fp8", "int8", "codebook", "lookup", "sparse", "lowrank")
RULES = (None, Filters(1.0), Filters(0.7), Filters(1.0, top_k=50), Filters(1.0, top_k=40, top_p=0.9))
POLICIES = ("k8v8:w128:s4", "k4v4:w128:s4", "skvq:k2v2:w128:s4", "skvq:k2v1.5:w128:s4")


@dataclass(frozen=True)
class Extent:
    """How much is checked; a test takes less."""

    rows: tuple[int, ...] = (1, 8, 9, 16, 17, 64, 65, 500)  # both ends of every entry of the table
    lengths: tuple[int, ...] = (700,)
    long: tuple[tuple[int, int], ...] = ((32768, 1), (5000, 3), (1500, 70))  # tokens, rows of them
    far_bytes: tuple[int, int] = FAR_BYTES
    family: tuple[int, int] = (4096, 2048)  # channels and outputs of a matrix of each other family
    stored: int = 77  # rows: more than a page of them
    num_draws: int = 16
    steps: int = 40


# ---- linear ----------------------------------------------------------------------------------------------------------


def matrices(n: int, k: int) -> dict[str, Callable[[], Any]]:
    return {
        **{f"{b}-bit g{g}": partial(random_affine, b, k, n, g, torch.float16, b) for b, g in ((4, 128), (3, 128))},
        "2-bit g64": partial(random_affine, 2, k, n, 64, torch.bfloat16, 2),
        "8-bit g32": partial(random_affine, 8, k, n, 32, torch.float16, 8),
        "4-bit nested": partial(random_nested, 4, k, n, 32, 5),
        "nf4 g64": partial(random_table, tables.NF4, k, n, 64, torch.float32, 6),
        "mxfp4 g32": partial(random_table, tables.E2M1, k, n, 32, torch.float8_e8m0fnu, 7),
        "nvfp4 g16": partial(random_table, tables.E2M1, k, n, 16, torch.float8_e4m3fn, 8),
    }


def check_linear(size: tuple[int, int], extent: Extent, device: torch.device) -> Iterator[Checked]:
    for name, make in matrices(*size).items():
        weights = placed(make(), device)
        affine = weights.family == "affine"
        for fixed in (False, True):
            kernel: Any = AffineTriton(fixed) if affine else TableTriton(fixed)
            packed = kernel.prepare(weights)
            matrix = weights.dequantize().double()
            for num_rows in extent.rows:
                x = torch.randn(num_rows, size[1], device=device).bfloat16()
                error = linear_error(x, packed, matrix, fixed)
                yield f"{name}{' fixed' * fixed}, {size[0]} x {size[1]}, {num_rows} rows", error


def linear_error(x: Tensor, packed: Packed, matrix: Tensor, fixed: bool) -> float:
    """The bound of the tests (tests/kernels/interpreted.py): of codes less `base` and of what that leaves, each."""
    y = torch.full((x.shape[0], packed.out_features), torch.nan, device=x.device)
    multiply(x, packed, y, fixed)
    exact, shift = x.double(), shift_of(packed)
    size = exact.abs() @ matrix.abs().T
    bound = dot_bound(exact, matrix - shift) + dot_bound(exact, shift) + 2 * EPS * (exact.abs() @ shift.abs().T)
    if packed.meaning == LOOKUP:
        bound += EPS_BF16 / 2 * size
    if packed.configs.of(x.shape[0], fixed).kernel == "many":
        bound += EPS_BF16 * size
    return worst(y, exact @ matrix.T, bound + EPS * size)


def shift_of(packed: Packed) -> Tensor:
    """What is added to every scaled value, [N, K] float64."""
    if packed.meaning != LINEAR:
        return torch.zeros(packed.out_features, packed.in_features, dtype=torch.float64, device=packed.words.device)
    scales = packed.scales.double()
    zeros = packed.center if packed.zeros is None else packed.zeros.double()
    offsets: Tensor | float = 0.0 if packed.offsets is None else packed.offsets.double()
    if packed.steps is not None:
        scales = scales * packed.steps.scales.double().repeat_interleave(packed.steps.ratio, dim=0)
        if packed.steps.offsets is not None:
            offsets = offsets * packed.steps.offsets.double().repeat_interleave(packed.steps.ratio, dim=0)
    shift = scales * (packed.base - zeros) * packed.factor + offsets
    return shift.T.repeat_interleave(packed.group_size, dim=1)[:, : packed.in_features]


def check_families(extent: Extent, device: torch.device) -> Iterator[Checked]:
    """The other families, whose weights become bfloat16 on their way: each term of a sum is off by as much as that, and
    the result once more. Wrong groups or rows are off by far more."""
    for family in FAMILIES:
        weights = placed(example(family, *extent.family, 3), device)
        matrix = weights.dequantize().double()
        for kernel in (found for found in kernels_for(family) if "triton" in found.name):
            joined = kernel.join([kernel.prepare(weights)])
            for num_rows in extent.rows:
                x = torch.randn(num_rows, weights.in_features, device=device).bfloat16()
                exact = getattr(weights, "rounding", None)
                near = (x if exact is None else exact.apply(x.float())).double()
                expected = near @ matrix.T
                bound = 4 * EPS_BF16 * (near.square() @ matrix.square().T).sqrt() + EPS_BF16 * expected.abs()
                yield f"{family} {kernel.name}, {num_rows} rows", worst(kernel.linear(x, joined)[0], expected, bound)


# ---- ops -------------------------------------------------------------------------------------------------------------


def check_ops(shape: Shape, extent: Extent, device: torch.device) -> Iterator[Checked]:
    """Bounds as in tests/kernels/interpreted.py."""
    for num_rows in extent.rows:
        x, delta = (torch.randn(num_rows, shape.hidden, device=device).bfloat16() for _ in range(2))
        weight = torch.randn(shape.hidden, device=device).bfloat16()
        total, normed = NormTriton().add_rms_norm(x, delta, weight, 1e-5)
        exact = x.double() + delta.double()
        yield f"sum, {num_rows} rows", worst(total, exact, EPS_BF16 * exact.abs())
        wide = total.double()
        expected = weight.double() * wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        yield f"rms_norm, {num_rows} rows", worst(normed, expected, (8 * EPS + 2 * EPS_BF16) * expected.abs())
        gate, up = (4 * torch.randn(num_rows, shape.intermediate, device=device).bfloat16() for _ in range(2))
        wide = gate.double()
        expected = wide / (1 + (-wide).exp()) * up.double()
        bound = (6 * EPS + EPS_BF16 + EPS * wide.abs()) * expected.abs()
        yield f"swiglu, {num_rows} rows", worst(ActivationTriton().swiglu(gate, up), expected, bound)
        yield f"rope, {num_rows} rows", rope_error(shape, num_rows, device)


def rope_error(shape: Shape, num_rows: int, device: torch.device) -> float:
    q = torch.randn(num_rows, shape.num_heads, shape.head_dim, device=device).bfloat16()
    k = torch.randn(num_rows, shape.num_kv_heads, shape.head_dim, device=device).bfloat16()
    angles = 100 * torch.rand(num_rows, shape.head_dim // 2, device=device)
    errors = []
    for x, found in zip((q, k), RopeTriton().rotate_pair(q, k, angles.cos(), angles.sin()), strict=True):
        low, high = x.double().chunk(2, dim=-1)
        cos, sin = (part[:, None].double() for part in (angles.cos(), angles.sin()))
        expected = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
        size = (low.square() + high.square()).sqrt().repeat(1, 1, 2)
        errors.append(worst(found, expected, 4 * EPS * size + EPS_BF16 * expected.abs()))
    return max(errors)


# ---- attention -------------------------------------------------------------------------------------------------------


def check_store(shape: Shape, extent: Extent, device: torch.device) -> Iterator[Checked]:
    """Of every kind of pages (benchmarks/gpu_pages.py)."""
    work = Attended(shape, 1, extent.stored, -(-extent.stored // 128) * 128, device)
    for policy in ("f16", *POLICIES):
        yield from check_stored(work, policy)


def check_sweep(extent: Extent, device: torch.device) -> Iterator[Checked]:
    """Every width with heads of 128 and 64 channels; other heads and page sizes with one: each takes compiling."""
    cases = [*product(WIDTHS, HEADS, (PAGE_SIZE,)), *product(WIDTHS[1:2], ((64, 1), (256, 7)), (PAGE_SIZE,))]
    cases += product(WIDTHS[1:2], HEADS[1:], (16, 128))
    for (bits, (dim, group), page_size), length, num_rows in product(cases, extent.lengths, (1, 3)):
        sweep = Sweep(bits, dim, group, page_size, length, num_rows)
        yield str(sweep), sweep.worst(device)


def check_long(extent: Extent, device: torch.device) -> Iterator[Checked]:
    """Decode steps over long contexts, which many programs share, and chunks of prompts, whose tiles are others."""
    for bits in ((8.0, 8.0), (4.0, 4.0), (2.0, 2.0)):
        for length, num_rows in extent.long:
            sweep = Sweep(bits, 128, 4, PAGE_SIZE, length, num_rows)
            yield str(sweep), sweep.worst(device)
    for length, num_rows in extent.long:
        yield f"f16, {num_rows} rows of {length}", f16_error(length, num_rows, device)


def f16_error(length: int, num_rows: int, device: torch.device) -> float:
    q, k, v = (random_tokens(length, heads, 128, heads) for heads in (8, 2, 2))
    table = list(range(-(-length // PAGE_SIZE)))
    pages = torch.full((len(table), *page_shape(2, PAGE_SIZE, 128)), torch.nan, dtype=torch.float16, device=device)

    def step(start: int) -> AttentionInputs:
        row = BatchRow([0] * (length - start), start, table, PAGE_SIZE, 0)
        return build_batch([row]).to(device).attention

    kernel, first = F16Triton(), length - num_rows
    kernel.store(k.to(device), v.to(device), pages, step(0))
    found = kernel.attend(q[first:].to(device), pages, step(first), SCALE).cpu()
    keys, values = (x.half().double().repeat_interleave(4, dim=1).transpose(0, 1)[:, None] for x in (k, v))
    shape = (8, num_rows, length, 128)
    return worst(found, *exact_attention(q[first:], keys.expand(shape), values.expand(shape), 0.0))


def check_far(shape: Shape, extent: Extent, device: torch.device) -> Iterator[Checked]:
    yield from check_far_pages(shape, min(extent.stored, PAGE_SIZE), extent.far_bytes, device)


# ---- sampling and steps ----------------------------------------------------------------------------------------------


def check_sampling(shape: Shape, extent: Extent, device: torch.device) -> Iterator[Checked]:
    """Ids that are not the reference's. Of such logits none is left to the CPU: one that is counts as wrong."""
    logits = 3 * torch.randn(extent.num_draws, shape.vocab, device=device)
    rows, reference = logits.cpu(), SamplingReference()
    for rules in RULES:
        draws = [RowDraw(row, rules, (row + 0.5) / extent.num_draws) for row in range(extent.num_draws)]
        found = SamplingTriton().draw_all(logits, draws).tolist()
        expected = [
            reference.argmax(rows[draw.row]) if rules is None else reference.draw(rows[draw.row], rules, draw.uniform)
            for draw in draws
        ]
        wrong = sum(ours != theirs for ours, theirs in zip(found, expected, strict=True))
        left = sum(ours == -1 for ours in found)
        yield f"{'greedy' if rules is None else rules}, {left} of {len(draws)} left", 2.0 * wrong


def check_steps(extent: Extent, device: torch.device) -> Iterator[Checked]:
    """A small model's prompts and decode steps, recorded against launched: logits that are not the same bits."""
    models = Models(SMALL, device)
    for policy in ("f16", K4V4, "skvq:k2v1.5:w32:s4"):
        loaded = models.loaded(W4, policy)
        cache = cache_for(loaded.layout, 3, 1200, 600)
        layers, others = (PageStorage(loaded.layout, 60, device, 3 * cache.recent_each).layers for _ in range(2))
        sizes = [Size(count, length) for count in (1, 4) for length in (700, 1200)]
        recorded = GraphRunner(loaded.model, layers, CudaRecorder(), sizes, PAGE_SIZE, cache.recent_each > 0)
        recorded.prepare(max_batch_tokens=64)
        launched = Runner(loaded.model, others)
        steps = [[cache.row(i, 0, 500 + 90 * i) for i in range(3)]]
        steps += [[cache.row(i, 500 + 90 * i + at, 1) for i in range(1 + at % 3)] for at in range(extent.steps)]
        for at, rows in enumerate(steps):
            batch = build_batch(rows)
            wrong = (launched.run(batch) != recorded.run(batch)).sum()
            yield f"{policy}, step {at}", 2.0 * float(wrong)


Check = Callable[[], Iterator[Checked]]


def checks(shape: Shape, extent: Extent, device: torch.device) -> dict[str, Check]:
    sizes = sorted({*shape.linears().values()} - {(shape.hidden, shape.num_heads * shape.head_dim)})
    return {
        "ops": partial(check_ops, shape, extent, device),
        "transforms": partial(check_transforms, shape, device),
        "store": partial(check_store, shape, extent, device),
        "sampling": partial(check_sampling, shape, extent, device),
        "attention long": partial(check_long, extent, device),
        **{f"linear {n} x {k}": partial(check_linear, (n, k), extent, device) for n, k in sizes},
        "families": partial(check_families, extent, device),
        "attention sweep": partial(check_sweep, extent, device),
        "steps": partial(check_steps, extent, device),
        "far": partial(check_far, shape, extent, device),
    }


def run(name: str, check: Check, write: Write) -> None:
    """Write down what is wrong, and how close to its bound the rest came."""
    highest, num_checked = 0.0, 0
    for what, error in check():
        num_checked, highest = num_checked + 1, max(highest, error)
        if not error <= 1:
            write({"group": name, "name": what, "worst": error, "error": "off"})
    write({"group": name, "checked": num_checked, "worst": highest})


def main() -> None:
    parser = arguments(__doc__, seconds=560, group_seconds=240)
    options = parser.parse_args()
    device = torch.device("cuda")
    every = checks(SHAPES["llama-3-8b"], Extent(), device)
    before = len(lines_of(options.out))
    main_of("benchmarks.gpu_check", options, list(every), lambda: lambda name: partial(run, name, every[name]), "check")
    if not options.worker and (wrong := _failures(lines_of(options.out)[before:])):
        raise SystemExit(f"{wrong} results are off or missing")


def _failures(lines: list[Line]) -> int:
    return sum("error" in line for line in lines)


if __name__ == "__main__":
    main()
