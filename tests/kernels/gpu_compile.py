"""What the Triton kernels cost once compiled: registers, stack and shared memory, without a GPU.

python -m tests.kernels.gpu_compile     compiles every case anew and writes gpu_budget.json
"""

import importlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.activation import gpu as activation_gpu
from kernels.gpu.codes import HALF_WORD
from kernels.gpu.configs import ANY, Config, default_configs, tables
from kernels.gpu.multiply import SUM_BLOCK, constants, num_stages
from kernels.gpu.packing import E2M1, LINEAR, LOOKUP, Packed, Steps, plane_of
from kernels.norm import gpu as norm_gpu
from kernels.rope import gpu as rope_gpu

BUDGET = Path(__file__).parent / "gpu_budget.json"
ARCHITECTURES = (80, 90, 100)
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.uint8: "u8",
    torch.int8: "i8",
}
K, N = 4096, 4096
SIZES = ("in_features", "out_features", "first_end", "second_end", "width", "half", "vocab")


@dataclass(frozen=True)
class Case:
    """One specialization for one architecture."""

    name: str
    architecture: int
    module: str  # under kernels.gpu
    kernel: str
    types: dict[str, str]  # of parameters that are not i32
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 1
    is_fused: bool = True  # whether a product and a sum may become one operation
    sizes: tuple[str, ...] = SIZES  # that are multiples of 16

    def __str__(self) -> str:
        return f"{self.name}, sm_{self.architecture}"


@dataclass(frozen=True)
class Resources:
    """Of one program, but for registers: of one thread."""

    registers: int
    stack: int  # bytes; where registers are spilled to
    shared: int  # bytes


def matrix(
    bits: int, group_size: int, zeros: torch.dtype | None = None, meaning: int = LINEAR, nested: bool = False
) -> Packed:
    """A matrix without data."""

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    is_exact = meaning == E2M1
    plane, groups = plane_of(bits, K, group_size, meaning, is_exact), K // group_size
    scales = empty(groups, N, dtype=torch.int8 if nested else torch.float16)
    return Packed(
        bits=bits,
        in_features=K,
        out_features=N,
        group_size=group_size,
        plane=plane,
        words=empty(N, K // (2 * (HALF_WORD // bits)), dtype=torch.int32),
        scales=empty(N, groups, dtype=torch.bfloat16) if is_exact else scales,
        zeros=None if zeros is None else empty(groups, N, dtype=zeros),
        offsets=empty(groups, N, dtype=torch.int8) if nested else None,
        steps=Steps(8, *(empty(groups // 8, N, dtype=torch.float16) for _ in range(2))) if nested else None,
        center=0 if nested else 1 << (bits - 1),
        meaning=meaning,
        table=empty(8, dtype=torch.int32) if meaning == LOOKUP else None,
        exact_scales=is_exact,
    )


MATRICES = {
    "4-bit g128": matrix(4, 128, torch.uint8),
    "2-bit g64": matrix(2, 64, torch.float16),
    "3-bit g128": matrix(3, 128, torch.uint8),
    "8-bit row": matrix(8, K),
    "4-bit nested g32": matrix(4, 32, nested=True),
    "E2M1 g16": matrix(4, 16, meaning=E2M1),
    "NF4 g64": matrix(4, 64, meaning=LOOKUP),
    "IQ4 g32": replace(matrix(4, 32, meaning=LOOKUP), mixed_table=True),
}


def linear_case(name: str, packed: Packed, config: Config, architecture: int) -> Case:
    """Parts are written in float32, what is not split in bfloat16."""
    tensors = {
        "x": torch.bfloat16,
        "words": torch.int32,
        "scales": packed.scales.dtype,
        "zeros": torch.float16 if packed.zeros is None else packed.zeros.dtype,
        "offsets": torch.float16 if packed.offsets is None else packed.offsets.dtype,
        "scale_steps": torch.float16,
        "offset_steps": torch.float16,
        "table": torch.int32,
        "out": torch.bfloat16 if config.max_tokens == ANY else torch.float32,
    }
    types = {tensor: f"*{TYPES[dtype]}" for tensor, dtype in tensors.items()} | {"factor": "fp32"}
    fixed, stages = constants(packed, config), num_stages(packed, config)
    return Case(f"{config}, {name}", architecture, "linear", config.kernel, types, fixed, config.num_warps, stages)


def row_cases(architecture: int) -> Iterator[Case]:
    """Rows of 4,096 and heads of 128 channels."""
    bf16 = ("x", "delta", "weight", "total", "out", "gate", "up", "q", "k", "q_out", "k_out")
    types = dict.fromkeys(bf16, "*bf16") | {"eps": "fp32", "cos": "*fp32", "sin": "*fp32"}
    block, warps = norm_gpu.block_for(K)
    for add in (0, 1):
        fixed = {"ADD": add, "BLOCK": block}
        yield Case(f"rms_norm{' of a sum' * add}", architecture, "rows", "rms_norm", types, fixed, warps)
    fixed = {"BLOCK": rope_gpu.block_for(64)}
    yield Case("rotate_pair", architecture, "rows", "rotate_pair", types, fixed, rope_gpu.NUM_WARPS)
    fixed = {"BLOCK": activation_gpu.BLOCK}
    yield Case("swiglu", architecture, "rows", "swiglu", types, fixed, activation_gpu.NUM_WARPS)
    types = {"parts": "*fp32", "out": "*bf16"}
    yield Case("sum_splits", architecture, "linear", "sum_splits", types, {"BLOCK": SUM_BLOCK}, 4)


def cases() -> Iterator[Case]:
    """The whole default table with 4-bit codes on every architecture; the other codes for a few tokens and for many on
    one, and what takes most shared memory and registers where there are least. Then all of every measured table."""
    entries = default_configs().entries
    for architecture in ARCHITECTURES:
        for config in entries:
            yield linear_case("4-bit g128", MATRICES["4-bit g128"], config, architecture)
        yield from row_cases(architecture)
    for name, packed in MATRICES.items():
        for config in (entries[0], entries[-1]) if name != "4-bit g128" else ():
            yield linear_case(name, packed, config, 90)
    for name in ("2-bit g64", "4-bit g128"):
        yield linear_case(name, MATRICES[name], entries[-1], 89)
    for name in ("E2M1 g16", "NF4 g64"):  # written in PTX
        for config in (entries[0], entries[-1]):
            yield linear_case(name, MATRICES[name], config, 80)
    yield from measured_cases()


def measured_cases() -> Iterator[Case]:
    """What the tables of GPUs have, for the architecture of each: every entry with all codes that it serves."""
    found: dict[str, Case] = {}
    for table in tables():
        if table.architecture is not None:
            for codes, config in table.entries():
                for name, packed in MATRICES.items():
                    if codes in (None, packed.codes):
                        case = linear_case(name, packed, config, table.architecture)
                        found[str(case)] = case
    yield from found.values()


def every_case(architecture: int) -> Iterator[tuple[str, Case]]:
    """All codes, by their name in MATRICES, with the whole default table: benchmarks/gpu_instructions.py."""
    for name, packed in MATRICES.items():
        for config in default_configs().entries:
            yield name, linear_case(name, packed, config, architecture)


def build(case: Case) -> Any:
    """Compile one case, with the pointers and sizes that torch gives: multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel: Any = getattr(importlib.import_module(f"kernels.gpu.{case.module}"), case.kernel)
    names: list[str] = kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.types.get(name, "i32") for name in names}
    even = [n for n in names if signature[n].startswith("*") or n in case.sizes]
    divisible = {(names.index(name),): [["tt.divisibility", 16]] for name in even}
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": case.is_fused}
    source = ASTSource(kernel, signature, case.constants, divisible)
    return triton.compile(source, target=GPUTarget("cuda", case.architecture, 32), options=options)


def dump(built: Any, option: str) -> str:
    """What cuobjdump, which comes with Triton, says of a compiled kernel."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(built: Any) -> Resources:
    usage = dump(built, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return Resources(int(found[1]), int(found[2]), built.metadata.shared)


def compiled(case: Case) -> Resources:
    return resources(build(case))


def record(budget: Path, every: Iterable[Case]) -> None:
    import triton

    found: dict[str, Any] = {"triton": triton.__version__.rpartition(".")[0], "cases": {}}
    for case in every:
        used = compiled(case)
        found["cases"][str(case)] = [-(-used.registers // 8) * 8, used.stack, used.shared]  # handed out by eights
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(sizes)}" for name, sizes in found["cases"].items())
    budget.write_text(f'{{\n  "triton": "{found["triton"]}",\n  "cases": {{\n{lines}\n  }}\n}}\n')


if __name__ == "__main__":
    record(BUDGET, cases())
