"""Attention on a GPU, as far as it can be judged without timing it: python -m benchmarks.gpu_attention COMMAND

instructions [--arch 90] [--json]
    Compiles the kernels and counts the instructions of the loop over packed tokens, and over float16 ones, in the
    machine code. Of a policy it tells the bytes of a token and kv head, the instructions that a multiprocessor issues
    for them, and two figures for an H200 as benchmarks.gpu_instructions knows it: which share of the bandwidth the loop
    can use if nothing else holds it up, and how many times as fast as float16 pages that would make it.

prompts [--arch 90] [--json]
    The same of tiles of a prompt, 64 columns, and of 16 as "triton-fixed" takes them: bytes and instructions for one
    query row, all its heads over a kv head, and one token of its context.

check [--lengths 40 ...] [--json]
    A sweep that is too long for tests: widths, head sizes, groups and page sizes against attention in float64, with the
    bound of the tests. On the CUDA device; where there is none, under TRITON_INTERPRET=1. Ends with an error where a
    result is off.
"""

import argparse
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product

import torch

from benchmarks.gpu_instructions import ARCHITECTURES, BYTES_PER_SECOND, INSTRUCTION, SLOTS_PER_SECOND
from engine.batch import Batch, BatchRow, build_batch
from kernels import gpu
from kernels.attention.quantized.cache import LayerCodec, QuantizedCache
from kernels.attention.quantized.gpu import QuantizedTriton
from kernels.attention.quantized.layout import RECENT_TOKENS
from kernels.attention.quantized.reference import QuantizedReference
from kernels.attention.quantized.transforms import Identity
from tests.kernels.attention_oracle import random_tokens
from tests.kernels.gpu_attention_compile import attend_case, chunk_layout
from tests.kernels.gpu_compile import Case, build, dump, resources
from tests.kernels.interpreted_attention import exact
from tests.kernels.kv_oracle import cache_of, row_codec

WIDTHS = ((8.0, 8.0), (4.0, 4.0), (4.0, 2.0), (3.0, 2.0), (2.0, 2.0), (2.0, 1.5))  # bits of keys and of values
HEADS = ((64, 4), (128, 4))  # channels, query heads for each kv head
LANES = 32  # of an instruction
SCALE = 0.3


@dataclass(frozen=True)
class Cost:
    case: str
    num_bytes: float  # of a token and kv head, keys and values
    instructions: float  # issued for it, by all warps of a program
    recent_instructions: float  # for one that is read in float16 beside its page
    registers: int  # a thread

    @property
    def share(self) -> float:
        """Of an H200's bandwidth; above 1 where memory is what holds it up."""
        return SLOTS_PER_SECOND / LANES / self.instructions * self.num_bytes / BYTES_PER_SECOND

    @property
    def seconds(self) -> float:
        return self.num_bytes / BYTES_PER_SECOND / min(1.0, self.share)


def inner_loops(assembly: str) -> list[int]:
    """Lengths, in order, of the loops that have no loop inside and multiply on tensor cores."""
    found = [(int(at, 16), name, rest) for at, name, rest in INSTRUCTION.findall(assembly)]
    positions = {at: i for i, (at, _, _) in enumerate(found)}
    loops: list[tuple[int, int]] = []
    for i, (at, name, rest) in enumerate(found):
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target and 0 < int(target[1], 16) < at:
            loops.append((positions[int(target[1], 16)], i + 1))
    inner = [(a, b) for a, b in loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)]
    return [b - a for a, b in sorted(inner) if any("MMA" in name for _, name, _ in found[a:b])]


def cost(case: Case, num_bytes: float) -> Cost:
    built, block = build(case), case.constants["BLOCK"]
    step = min(block, case.constants["PAGE"])
    packed, *recent = inner_loops(dump(built, "-sass"))
    issued = packed * case.num_warps / step
    beside = (
        recent[-1] * case.num_warps / (block if case.module == "quantized" else RECENT_TOKENS) if recent else issued
    )
    return Cost(case.name, num_bytes, issued, beside, resources(built).registers)


def costs(architecture: int) -> Iterator[tuple[Cost, Cost]]:
    """Each beside that of float16 pages."""
    for heads in HEADS:
        case = attend_case(architecture, heads, None)
        plain = cost(case, 4 * heads[0])
        yield plain, plain
        for bits in WIDTHS:
            case = attend_case(architecture, heads, bits)
            yield cost(case, chunk_layout(bits, heads[0]).token_bytes), plain


def show_instructions(architecture: int, is_json: bool) -> None:
    for found, plain in costs(architecture):
        ratio = plain.seconds / found.seconds
        if is_json:
            print(json.dumps(asdict(found) | {"share": found.share, "ratio": ratio}), flush=True)
        else:
            print(
                f"{found.case:38} {found.num_bytes:4.0f} bytes, {found.instructions:5.1f} instructions "
                f"({found.recent_instructions:.1f} in float16), {100 * found.share:4.0f} % of the bandwidth, "
                f"{ratio:4.2f} x f16, {found.registers} registers",
                flush=True,
            )


def show_prompts(architecture: int, is_json: bool) -> None:
    for heads, bits, what in product(HEADS, (None, *WIDTHS), ("fixed", "prompts")):
        case = attend_case(architecture, heads, bits, what)
        token_bytes = 4 * heads[0] if bits is None else chunk_layout(bits, heads[0]).token_bytes
        rows = case.constants["COLUMNS"] // heads[1]
        found = cost(case, token_bytes)
        row = {"case": case.name, "bytes": token_bytes / rows, "instructions": found.instructions / rows}
        print(
            json.dumps(row)
            if is_json
            else f"{case.name:46} {row['bytes']:5.1f} bytes, {row['instructions']:5.2f} instructions",
            flush=True,
        )


@dataclass(frozen=True)
class Sweep:
    bits: tuple[float, float]
    head_dim: int
    group: int  # query heads of a kv head
    page_size: int
    length: int
    num_rows: int = 2  # the last ones, which are attended; two of four heads each fill the tile of a decode step

    def worst(self, device: torch.device) -> float:
        """The largest error of the last rows, in parts of the bound."""
        dim, length = self.head_dim, self.length
        keys, values = (row_codec(bits, dim, dim // 2, 2, seed=5 + i) for i, bits in enumerate(self.bits))
        codec = LayerCodec(keys, values, Identity(), Identity(), window=min(17, length), num_sinks=4)
        num_pages, num_recent = -(-length // self.page_size), -(-length // RECENT_TOKENS)
        cache = cache_of(codec, (num_pages, self.page_size, num_recent))
        cache.pages.fill_(0x7F)
        cache.recent.fill_(torch.nan)
        q, k, v = (random_tokens(length, heads, dim, heads) for heads in (2 * self.group, 2, 2))
        QuantizedReference().store(k, v, cache, self._row(0).attention)
        last = slice(-self.num_rows, None)
        expected, bound = exact((q, k, v), cache, self.num_rows)
        moved = QuantizedCache(codec.to(device), cache.layout, cache.pages.to(device), cache.recent.to(device))
        inputs = self._row(length - self.num_rows).to(device).attention
        found = QuantizedTriton().attend(q[last].to(device), moved, inputs, SCALE).cpu()
        return float(((found - expected).abs() / bound).nan_to_num(torch.inf).max())

    def _row(self, start: int) -> Batch:
        table = list(range(-(-self.length // self.page_size)))
        recent = {at: at for at in range(-(-self.length // RECENT_TOKENS))}
        return build_batch([BatchRow([0] * (self.length - start), start, table, self.page_size, 0, recent)])


def check(lengths: list[int], is_json: bool) -> None:
    if not torch.cuda.is_available() and os.getenv("TRITON_INTERPRET") != "1":
        raise SystemExit("there is no CUDA device: set TRITON_INTERPRET=1 to check under Triton's interpreter")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    failed = 0
    for bits, (dim, group), page_size, length in product(WIDTHS, (*HEADS, (64, 1), (256, 7)), (16, 64, 128), lengths):
        sweep = Sweep(bits, dim, group, page_size, length)
        worst = sweep.worst(device)
        failed += worst > 1
        print(
            json.dumps(asdict(sweep) | {"worst": worst}) if is_json else f"{sweep}: {worst:.3f} of the bound",
            flush=True,
        )
    if failed:
        raise SystemExit(f"{failed} results are off")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("instructions", "prompts", "check"))
    architecture = "compute capability to compile for"
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, default=90, help=architecture)
    parser.add_argument("--lengths", type=int, nargs="*", default=[40, 700], help="tokens, at least 4")
    parser.add_argument("--json", action="store_true", help="one object a line")
    options = parser.parse_args()
    if gpu.MISSING is not None:
        raise SystemExit(gpu.MISSING)
    if options.command == "check":
        check(options.lengths, options.json)
    elif options.command == "prompts":
        show_prompts(options.arch, options.json)
    else:
        show_instructions(options.arch, options.json)


if __name__ == "__main__":
    main()
