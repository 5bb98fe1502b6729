"""What the attention kernels cost once compiled; tests/kernels/gpu_compile.py says how.

python -m tests.kernels.gpu_attention_compile     compiles every case anew and writes gpu_attention_budget.json
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from kernels.attention.f16 import gpu as plain
from kernels.attention.quantized import gpu as quantized
from kernels.attention.quantized.codec import LIMIT
from kernels.attention.quantized.layout import ChunkLayout, RowLayout
from kernels.gpu.steps import Tiling
from tests.kernels.gpu_compile import ARCHITECTURES, Case, record

BUDGET = Path(__file__).parent / "gpu_attention_budget.json"
PAGE_SIZE = 64
WIDTHS = (
    (4.0, 4.0),
    (4.0, 2.0),
    (2.0, 1.5),
    (8.0, 8.0),
    (3.0, 2.0),
    (1.5, 3.0),
    (8.0, 16.0),
    (16.0, 4.0),
)  # bits of keys and of values
HEADS = ((128, 4), (64, 4), (128, 1), (128, 7), (256, 8))  # channels, query heads for each kv head

POINTERS = {
    "pages": "*fp16",
    "chunks": "*u8",
    "words": "*i32",
    "halves": "*fp16",
    "recent": "*fp16",
    "tables": "*i64",
    "table": "*i64",
    "recent_tables": "*i64",
    "slots": "*i64",
    "tiles": "*i32",
    "rows": "*i32",
    "key_prescale": "*fp32",
    "value_prescale": "*fp32",
    "clip": "*fp32",
    "prescale": "*fp32",
    "part_sums": "*fp32",
    "part_stats": "*fp32",
    "factor": "fp32",
}


def chunk_layout(bits: tuple[float, float], head_dim: int, group_size: int | None = None) -> ChunkLayout:
    group = group_size or head_dim // 2
    return ChunkLayout(RowLayout(bits[0], head_dim, group), RowLayout(bits[1], head_dim, group), PAGE_SIZE)


def attend_case(
    architecture: int,
    heads: tuple[int, int],
    bits: tuple[float, float] | None,
    what: str = "decode",
    group_size: int | None = None,
) -> Case:
    """Attention over pages of `bits`, of float16 where there are none, as decode steps or prompts take it ("prompts"),
    or either of "triton-fixed" ("fixed"). group_size: channels, half a head where none is given."""
    head_dim, group = heads
    is_wide = what == "prompts"
    tiling = Tiling(group, plain.SPLIT)
    if what == "fixed":
        tiling = Tiling(group, plain.FIXED_SPLIT, fixed=True)
    if bits is None:
        name, module, q, stages = "f16", "attention", "*bf16", plain.NUM_STAGES
        fixed = plain.constants(head_dim, PAGE_SIZE, tiling, plain.BLOCK, is_wide)
        warps = plain.num_warps(head_dim, is_wide)
    else:
        name, q, layout = f"k{bits[0]:g}v{bits[1]:g}", "*fp32", chunk_layout(bits, head_dim, group_size)
        how = quantized.how_for(layout, group, is_wide, what == "fixed")
        module, warps, stages = how.module, how.num_warps, how.num_stages
        tiling = replace(tiling, least=how.columns)
        fixed = quantized.constants(layout, tiling, plain.BLOCK, how)
    label = f"attend {name}, {head_dim} channels, {group} heads{'' if what == 'decode' else ', ' + what}"
    if group_size:
        label += f", groups of {group_size}"
    return Case(label, architecture, module, "attend", POINTERS | {"q": q}, fixed, warps, stages)


def store_cases(architecture: int, bits: tuple[float, float]) -> Iterator[Case]:
    """Keys, whose planes lie unit by unit, and values."""
    layout = chunk_layout(bits, 128)
    for what, row in (("keys", layout.keys), ("values", layout.values)):
        fixed = quantized.store_constants(layout, what == "keys", is_origin=False)
        label, types = f"store {what} of {row.bits:g} bits", POINTERS | {"x": "*fp32"}
        yield Case(label, architecture, "quantize", "store", types, fixed, plain.STORE_WARPS, is_fused=False)


def cases() -> Iterator[Case]:
    """What a model of 128 channels and 4 bits takes on every architecture; other widths and heads on one."""
    for architecture in ARCHITECTURES:
        for bits in (None, WIDTHS[0]):
            yield attend_case(architecture, HEADS[0], bits)
            yield attend_case(architecture, HEADS[0], bits, "prompts")
        yield attend_case(architecture, HEADS[0], (2.0, 2.0))
        yield from store_cases(architecture, WIDTHS[0])
    for heads in HEADS[1:]:
        yield attend_case(90, heads, None)
        yield attend_case(90, heads, WIDTHS[0])
    yield attend_case(90, HEADS[0], WIDTHS[0], group_size=16)
    yield attend_case(90, HEADS[-1], (2.0, 2.0), group_size=32)
    yield attend_case(90, HEADS[0], WIDTHS[0], "fixed")
    yield attend_case(80, HEADS[-1], WIDTHS[0], "prompts")
    yield attend_case(80, HEADS[0], WIDTHS[-1], "prompts")
    for bits in WIDTHS[1:]:
        yield attend_case(90, HEADS[0], bits)
    for bits in ((8.0, 8.0), (3.0, 3.0), (2.0, 2.0), (1.5, 1.5), (16.0, 16.0)):
        yield from store_cases(90, bits)
    types, fixed = POINTERS | {"out": "*bf16"}, {"HEAD_DIM": 128, "D": 128}
    yield Case("merge", 90, "attention", "merge", types, fixed, plain.MERGE_WARPS)
    fixed = fixed | {"PARTS": plain.COMBINED}
    yield Case("combine", 90, "attention", "combine", types, fixed, plain.COMBINE_WARPS)
    types = {"x": "*bf16", "out": "*fp32", "factor": "fp32"}
    fixed = quantized.turn_constants(128, LIMIT)
    yield Case("hadamard", 90, "quantize", "hadamard", types, fixed, plain.STORE_WARPS, is_fused=False)
    types = POINTERS | {"k": "*bf16", "v": "*bf16"}
    fixed = plain.store_constants(128, PAGE_SIZE)
    yield Case("store f16", 90, "attention", "store", types, fixed, plain.STORE_WARPS)


if __name__ == "__main__":
    record(BUDGET, cases())
