"""How fast this machine's GPU is with our kernels:  python -m benchmarks.gpu [--json] [--only linear attention ...]

Whole models first (benchmarks/gpu_model.py says what), then kernels: one layer's matrices at several numbers of rows,
attention of decode steps and prompts, what stores keys and values, ops on rows and sampling, beside what torch offers
for the same work: bfloat16 products, its 4-bit product, scaled dot product attention by each of its back ends,
FlexAttention, logits sorted or only copied to the CPU; and a copy in device memory, which says what bandwidth there is.

All of a group take turns, call by call; before each call 512 MB are written, so that nothing it reads lies in the L2
cache, and the GPU waits a millisecond, so that the host is ahead of it. Times are from CUDA events; a trial's time is
the median of its rounds, its ratio the first case's time over a case's, and what is told is the median of the trials
with the lowest and the highest ratio. Bytes are those that a call must read and write.

Results are added to a file, one JSON object a line, as they come (benchmarks/gpu_timing.py). Without a CUDA device it
ends with a message: benchmarks.gpu_instructions says what can be known then.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from benchmarks import gpu_model
from benchmarks.gpu_timing import Case, Clock, Group, Maker, Timing, arguments, copy_case, main_of
from benchmarks.shapes import SHAPES, Shape
from benchmarks.workers import Write
from engine.batch import Batch, BatchRow, build_batch
from kernels import gpu
from kernels.activation.gpu import ActivationTriton
from kernels.attention.f16.gpu import F16Triton
from kernels.attention.f16.layout import page_shape
from kernels.attention.quantized.cache import QuantizedCache, recent_page_shape
from kernels.attention.quantized.gpu import QuantizedTriton
from kernels.attention.quantized.layout import ChunkLayout
from kernels.contract import Filters, RowDraw
from kernels.gpu.multiply import TritonKernel
from kernels.linear.affine.gpu import AffineTriton
from kernels.linear.affine.layout import AffineWeights
from kernels.linear.table import tables
from kernels.linear.table.gpu import TableTriton
from kernels.linear.table.layout import TableWeights
from kernels.norm.gpu import NormTriton
from kernels.rope.gpu import RopeTriton
from kernels.sampling.gpu import SamplingTriton
from kvcache.codecs import uncalibrated_codec
from kvcache.policy import read_policy

MODELS = ("llama-3.2-1b", "llama-3-8b")
WIDTHS = {"w4 g128": (4, 128), "w2 g64": (2, 64), "w8 row": (8, 0)}
TABLES = {"nf4 g64": (tables.NF4, 64), "e2m1 g16": (tables.E2M1, 16)}
POLICIES = ("k8v8:w128:s4", "k4v4:w128:s4", "skvq:k2v2:w128:s4")
SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
SDPA |= {"efficient": SDPBackend.EFFICIENT_ATTENTION}
SAMPLERS = {
    "greedy": None,
    "temperature": Filters(1.0),
    "top-k 50": Filters(1.0, top_k=50),
    "top-k 50, top-p 0.9": Filters(1.0, top_k=50, top_p=0.9),
}
PAGE_SIZE = 64  # tokens
RECENT = 16


@dataclass(frozen=True)
class Extent:
    """How much is timed; a test takes less."""

    rows: tuple[int, ...] = (1, 4, 16, 64, 512)  # of activations
    steps: tuple[tuple[int, int], ...] = ((8, 4096), (1, 32768), (8, 32768))  # sequences, tokens of each
    prompts: tuple[tuple[int, int], ...] = ((512, 512), (512, 4096), (4096, 4096))  # rows, tokens with those before
    op_rows: tuple[int, ...] = (1, 512)
    draws: tuple[int, ...] = (1, 64)


def linear_makers(shape: tuple[int, int], num_rows: int, device: torch.device) -> Iterator[Maker]:
    """(outputs, inputs); random codes, for speed does not depend on them."""
    n, k = shape
    x = torch.randn(num_rows, k, device=device).bfloat16()
    traffic = 2 * num_rows * (n + k)

    def dense() -> Case:
        weight = torch.randn(n, k, device=device).bfloat16()
        return Case("torch bf16", 2 * n * k + traffic, partial(functional.linear, x, weight))

    def ours(name: str, kernel: TritonKernel, weights: Any) -> Case:
        packed = kernel.prepare(weights)  # type: ignore[attr-defined]
        return Case(name, packed.num_bytes + traffic, partial(kernel.linear, x, kernel.join([packed])))

    yield Maker("torch bf16", dense)
    for name, (bits, group) in WIDTHS.items():
        make = partial(affine, bits, shape, group or k, device)
        yield Maker(name, lambda name=name, make=make: ours(name, AffineTriton(), make()))  # type: ignore[misc]
    fixed = partial(affine, 4, shape, 128, device)
    yield Maker("w4 g128 fixed", lambda: ours("w4 g128 fixed", AffineTriton(fixed=True), fixed()))
    for name, (table, group) in TABLES.items():
        entries = partial(tabled, table, shape, group, device)
        yield Maker(name, lambda name=name, entries=entries: ours(name, TableTriton(), entries()))  # type: ignore[misc]
    yield Maker(
        "torch int4 g128", lambda: Case("torch int4 g128", n * k // 2 + n * k // 32 + traffic, torch_int4(x, n))
    )


def affine(bits: int, shape: tuple[int, int], group: int, device: torch.device) -> AffineWeights:
    (n, k), groups = shape, shape[1] // group
    return AffineWeights(
        bits,
        k,
        group,
        torch.randint(0, 256, (n, k * bits // 8), dtype=torch.uint8, device=device),
        torch.rand(n, groups, device=device).half(),
        torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8, device=device),
    )


def tabled(table: tuple[float, ...], shape: tuple[int, int], group: int, device: torch.device) -> TableWeights:
    n, k = shape
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
    stored = torch.float8_e4m3fn if table == tables.E2M1 else torch.float16  # NVFP4's
    return TableWeights(4, k, group, codes, torch.rand(n, k // group, device=device).to(stored), table)


def torch_int4(x: Tensor, n: int) -> Callable[[], object]:
    k = x.shape[1]
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=x.device)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    parameters = torch.rand(k // 128, n, 2, device=x.device).bfloat16()
    return partial(torch.ops.aten._weight_int4pack_mm, x, packed, 128, parameters)


@dataclass(frozen=True)
class Attended:
    """Sequences of one length, of which the last rows are queries."""

    shape: Shape
    num_seqs: int
    num_rows: int  # of each
    context: int
    device: torch.device

    @property
    def pages_each(self) -> int:
        return -(-self.context // PAGE_SIZE)

    @property
    def f16_bytes(self) -> int:
        return self.num_seqs * self.shape.num_kv_heads * self.context * 4 * self.shape.head_dim

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).bfloat16()

    def queries(self) -> Tensor:
        return self.random(self.num_seqs * self.num_rows, self.shape.num_heads, self.shape.head_dim)

    def step(self, recent_each: int = 0) -> Batch:
        """recent_each: recent pages of a sequence, the first of them for its sinks."""
        rows = []
        for i in range(self.num_seqs):
            last = self.context // RECENT
            high = [0, *range(max(1, last - recent_each + 1), last)] if recent_each else []
            table = list(range(i * self.pages_each, (i + 1) * self.pages_each))
            held = {at: i * recent_each + j for j, at in enumerate(high)}
            rows.append(BatchRow([0] * self.num_rows, self.context - self.num_rows, table, PAGE_SIZE, 1, held))
        return build_batch(rows).to(self.device)


def attention_makers(work: Attended) -> Iterator[Maker]:
    """torch's back ends, ours over float16 pages and over packed ones."""
    for name, backend in SDPA.items():
        yield Maker(f"sdpa {name}", partial(sdpa, work, f"sdpa {name}", backend))
    yield Maker("flex", partial(flex, work))
    yield Maker("f16 pages", partial(plain, work, F16Triton()))
    yield Maker("f16 pages fixed", partial(plain, work, F16Triton(fixed=True)))
    for policy in POLICIES:
        yield Maker(policy, partial(packed_pages, work, policy))


def sdpa(work: Attended, name: str, backend: SDPBackend) -> Case:
    """Of a decode step the query heads that share a kv head are rows of one head, so that its keys are read once."""
    shape, num_rows = work.shape, work.num_rows
    kv, dim, group = shape.num_kv_heads, shape.head_dim, shape.num_heads // shape.num_kv_heads
    k, v = (work.random(work.num_seqs, kv, work.context, dim) for _ in range(2))
    if num_rows == 1:
        q = work.random(work.num_seqs, kv, group, dim)
        attend = partial(functional.scaled_dot_product_attention, q, k, v)
    else:
        q = work.random(work.num_seqs, shape.num_heads, num_rows, dim)
        mask: Tensor = causal_lower_right(num_rows, work.context)  # flash takes no dense one, the others no other
        if backend != SDPBackend.FLASH_ATTENTION:
            mask = causal_mask(num_rows, work.context, work.device)
        attend = partial(functional.scaled_dot_product_attention, q, k, v, mask, enable_gqa=True)
        if num_rows == work.context:
            attend = partial(functional.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return attend()

    return Case(name, work.f16_bytes, call)


def causal_mask(num_rows: int, context: int, device: torch.device) -> Tensor:
    last = torch.arange(context - num_rows, context, device=device)
    return torch.arange(context, device=device) <= last[:, None]


def flex(work: Attended) -> Case:
    """Compiled for this shape, untuned."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    shape, first = work.shape, work.context - work.num_rows
    q = work.random(work.num_seqs, shape.num_heads, work.num_rows, shape.head_dim)
    k, v = (work.random(work.num_seqs, shape.num_kv_heads, work.context, shape.head_dim) for _ in range(2))
    mask = None
    if work.num_rows > 1:

        def causal(_: Tensor, __: Tensor, row: Tensor, column: Tensor) -> Tensor:
            return row + first >= column

        mask = create_block_mask(causal, None, None, work.num_rows, work.context, device=work.device.type)
    compiled = torch.compile(flex_attention, dynamic=False)
    return Case("flex", work.f16_bytes, partial(compiled, q, k, v, block_mask=mask, enable_gqa=True))


def plain(work: Attended, kernel: F16Triton) -> Case:
    shape = work.shape
    sizes = (work.num_seqs * work.pages_each, *page_shape(shape.num_kv_heads, PAGE_SIZE, shape.head_dim))
    pages = torch.randn(sizes, device=work.device, dtype=torch.float16)
    step, q = work.step().attention, work.queries()
    name = "f16 pages" + " fixed" * (kernel.name != "triton")
    return Case(name, work.f16_bytes, partial(kernel.attend, q, pages, step, shape.head_dim**-0.5))


def packed_pages(work: Attended, policy: str) -> Case:
    shape = work.shape
    cache, recent_each = random_cache(work, policy)
    step, q = work.step(recent_each).attention, work.queries()
    num_bytes = cache.pages.nbytes + cache.recent.nbytes
    return Case(policy, num_bytes, partial(QuantizedTriton().attend, q, cache, step, shape.head_dim**-0.5))


def random_cache(work: Attended, policy: str) -> tuple[QuantizedCache, int]:
    """One layer, every byte random but those of scales, which stay finite; and the recent pages of a sequence."""
    shape = work.shape
    layer = read_policy(policy).layers(1, shape.head_dim)[0]
    codec = uncalibrated_codec(layer, shape.num_kv_heads, shape.head_dim).to(work.device)
    layout = ChunkLayout(codec.keys.layout, codec.values.layout, PAGE_SIZE)
    sizes = (work.num_seqs * work.pages_each, shape.num_kv_heads, layout.chunk_bytes)
    pages = torch.randint(0, 256, sizes, dtype=torch.uint8, device=work.device)
    pages[..., layout.key_parameters_at :] = 0x38  # as e4m3 1, as float16 a half
    recent_each = 1 + -(-(codec.window + work.num_rows) // RECENT)  # the sinks', the window's
    recent_shape = recent_page_shape(shape.num_kv_heads, shape.head_dim)
    recent = torch.randn(work.num_seqs * recent_each, *recent_shape, device=work.device)
    return QuantizedCache(codec, layout, pages, recent.half()), recent_each


def store_makers(shape: Shape, num_rows: int, device: torch.device) -> Iterator[Maker]:
    """One row of as many sequences, or a prompt: what is written is little, so that launching is what is timed."""
    work = Attended(shape, 1, num_rows, -(-(num_rows + 1) // 128) * 128, device)
    k, v = (work.random(num_rows, shape.num_kv_heads, shape.head_dim) for _ in range(2))
    num_bytes = 2 * k.nbytes

    def f16() -> Case:
        sizes = (work.pages_each, *page_shape(shape.num_kv_heads, PAGE_SIZE, shape.head_dim))
        pages = torch.zeros(sizes, dtype=torch.float16, device=device)
        return Case("f16 pages", 2 * num_bytes, partial(F16Triton().store, k, v, pages, work.step().attention))

    def packed(policy: str) -> Case:
        cache, recent_each = random_cache(work, policy)
        step = work.step(recent_each).attention
        return Case(policy, 2 * num_bytes, partial(QuantizedTriton().store, k, v, cache, step))

    yield Maker("f16 pages", f16)
    for policy in POLICIES:
        yield Maker(policy, partial(packed, policy))


def row_makers(shape: Shape, num_rows: int, device: torch.device) -> Iterator[Maker]:
    x = torch.randn(num_rows, shape.hidden, device=device).bfloat16()
    gate = torch.randn(num_rows, shape.intermediate, device=device).bfloat16()
    q = torch.randn(num_rows, shape.num_heads, shape.head_dim, device=device).bfloat16()
    k = q[:, : shape.num_kv_heads].contiguous()
    angles = torch.randn(num_rows, shape.head_dim // 2, device=device)
    weight = x[0].clone()
    cases = (
        Case("torch rms_norm", 4 * x.numel(), partial(functional.rms_norm, x, (shape.hidden,), weight, 1e-5)),
        Case("rms_norm", 4 * x.numel(), partial(NormTriton().rms_norm, x, weight, 1e-5)),
        Case("rms_norm of a sum", 8 * x.numel(), partial(NormTriton().add_rms_norm, x, x, weight, 1e-5)),
        Case("swiglu", 6 * gate.numel(), partial(ActivationTriton().swiglu, gate, gate)),
        Case("rope", 2 * (q.nbytes + k.nbytes), partial(RopeTriton().rotate_pair, q, k, angles.cos(), angles.sin())),
    )
    for case in cases:
        yield Maker(case.name, lambda case=case: case)  # type: ignore[misc]


def sampling_makers(shape: Shape, num_rows: int, device: torch.device) -> Iterator[Maker]:
    """A draw from each row. All must read the logits once."""
    logits = 2 * torch.randn(num_rows, shape.vocab, device=device)
    kernel = SamplingTriton()
    cases = [
        Case("logits to the CPU", logits.nbytes, logits.cpu),
        Case("torch sort", logits.nbytes, partial(torch.sort, logits, descending=True, stable=True)),
        Case("torch argmax", logits.nbytes, partial(torch.argmax, logits, dim=-1)),
    ]
    for name, filters in SAMPLERS.items():
        draws = [RowDraw(row, filters, 0.4) for row in range(num_rows)]
        cases.append(Case(name, logits.nbytes, partial(kernel.draw_all, logits, draws)))
    for case in cases:
        yield Maker(case.name, lambda case=case: case)  # type: ignore[misc]


def groups(shape: Shape, device: torch.device, extent: Extent) -> dict[str, Callable[[], Group]]:
    """By name; nothing is made before its turn."""
    makers: dict[str, Callable[[], Iterator[Maker]]] = {}
    for size in sorted(set(shape.linears().values())):
        for rows in extent.rows:
            makers[f"linear {size[0]} x {size[1]}, {rows} rows"] = partial(linear_makers, size, rows, device)
    for num_seqs, context in extent.steps:
        work = Attended(shape, num_seqs, 1, context, device)
        makers[f"attention, {num_seqs} steps of {context}"] = partial(attention_makers, work)
    for rows, context in extent.prompts:
        work = Attended(shape, 1, rows, context, device)
        makers[f"attention, {rows} rows of {context}"] = partial(attention_makers, work)
    for rows in extent.op_rows:
        makers[f"store, {rows} rows"] = partial(store_makers, shape, rows, device)
        makers[f"ops, {rows} rows"] = partial(row_makers, shape, rows, device)
    for rows in extent.draws:
        makers[f"sampling, {rows} of {shape.vocab:,}"] = partial(sampling_makers, shape, rows, device)
    return {name: partial(_group, name, make) for name, make in makers.items()}


def _group(name: str, makers: Callable[[], Iterator[Maker]]) -> Group:
    return Group(name, list(makers()))


def main() -> None:
    parser = arguments(__doc__, seconds=560)
    parser.add_argument("--model", choices=MODELS, default="llama-3-8b", help="whose kernels (default: %(default)s)")
    parser.add_argument(
        "--trials", type=int, default=5, help="of each kernel; told is their median (default: %(default)s)"
    )
    options = parser.parse_args()
    device = torch.device("cuda")
    every = groups(SHAPES[options.model], device, Extent())

    def start() -> Callable[[str], Callable[[Write], None]]:
        if (reason := gpu.refusal(device, torch.bfloat16)) is not None:
            raise SystemExit(reason)
        timing, whole = Timing(Clock(device), copy_case(device), options.trials), gpu_model.on_gpu(device)
        return lambda name: partial(timing.run, every[name]()) if name in every else whole[name]

    main_of("benchmarks.gpu", options, [*gpu_model.names(), *every], start)


if __name__ == "__main__":
    main()
