"""The Triton kernels of both caches without a GPU: interpreted, compiled within a budget, and how a step is cut up."""

import json
import math

import pytest
import torch

from kernels import gpu
from kernels.attention import f16, quantized
from kernels.attention.f16.gpu import F16Triton
from kernels.attention.quantized.cache import QuantizedSpec
from kernels.attention.quantized.gpu import QuantizedTriton, how_for
from kernels.attention.quantized.layout import ChunkLayout, RowLayout
from kernels.contract import AttentionInputs, AttentionSpec
from kernels.gpu.steps import MULTIPROCESSORS, Launch, Tiling, launches
from tests.kernels.gpu_attention_compile import BUDGET, cases
from tests.kernels.gpu_checks import check_budget, check_interpreted, check_names, needs_interpreter, needs_triton
from tests.kernels.gpu_compile import Case


@needs_interpreter
def test_kernels_agree_with_their_references_under_the_interpreter() -> None:
    check_interpreted("interpreted_attention")


@needs_triton
@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_kernels_compile_within_their_budget(
    case: Case, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a change that makes a kernel spill registers, or that keeps keys from being loaded by vectors, which takes
    a register or two for each of them."""
    check_budget(case, BUDGET, request, monkeypatch)


def test_the_budget_is_of_the_cases_that_exist() -> None:
    check_names(BUDGET, cases())


@pytest.mark.parametrize("case", [case for case in cases() if case.module == "decode_steps"], ids=str)
def test_programs_that_are_planned_run_at_once(case: Case) -> None:
    """Bug: groups of 16 channels, with 255 registers and 36 KB a program, planned as if they took what two groups of a
    head do: the last programs wait for all others to end."""
    fixed = case.constants
    keys, values = (RowLayout(float(fixed[f"{x}_BITS"]), fixed["D"], fixed[f"{x}_GROUP"]) for x in "KV")
    how = how_for(ChunkLayout(keys, values, fixed["PAGE"]), fixed["G"], False, False)
    registers, _, shared = json.loads(BUDGET.read_text())["cases"][str(case)]
    num_processors, memory = {80: (108, 164), 90: (132, 228), 100: (148, 228)}[case.architecture]  # A100, H100, B200
    by_registers = 65536 // (32 * how.num_warps * registers)
    at_once = min(by_registers, memory * 1024 // (shared + 1024))  # 1 KiB of each program is the driver's
    assert MULTIPROCESSORS * how.residents <= num_processors * at_once


def rows_of(launch: Launch) -> list[tuple[int, int, int]]:
    """(query row, position, window) of each row that the tiles of a launch serve."""
    tiles = launch.tiles.tolist()
    return [(row + i, at + i, window) for _, row, _, at, count, window, _ in tiles for i in range(count)]


def step(*rows: tuple[int, int]) -> AttentionInputs:
    """(start, number of rows) of each sequence."""
    starts = [0]
    for _, count in rows:
        starts.append(starts[-1] + count)
    tables, slots = torch.zeros(len(rows), 1, dtype=torch.int64), torch.zeros(starts[-1], dtype=torch.int64)
    return AttentionInputs(tuple(starts), tuple(start + count for start, count in rows), tables, slots)


def test_every_row_of_a_step_is_served_once() -> None:
    """Bug: a row lost between tiles or served by two launches, a part of another row overwritten."""
    inputs, windows = step((100, 1), (0, 9), (7, 4), (5, 0)), (20, 1 << 40, 0, 3)
    made = launches(inputs, Tiling(4, 32, fixed=True), windows, torch.device("cpu"))
    expected = [(0, 100, 20), *((1 + i, i, 1 << 30) for i in range(9)), *((10 + i, 7 + i, 0) for i in range(4))]
    assert sorted(row for launch in made for row in rows_of(launch)) == expected
    spread, whole = made
    assert (spread.num_parts, spread.is_wide) == (4, False)
    assert spread.rows.tolist() == [[0, 4], *([10 + i, 1] for i in range(4))]  # 101 tokens are 4 splits of 32
    assert (whole.num_parts, whole.is_wide) == (1, False)
    for launch in made:
        served = [row + i for _, _, row, _, count, _, _ in launch.tiles.tolist() for i in range(count)]
        assert served == list(range(len(launch.rows)))
    assert launches(inputs, Tiling(4, 32, fixed=True), windows, torch.device("cpu")) is made  # the next layer's
    free = launches(inputs, Tiling(4, 32), windows, torch.device("cpu"))
    assert sorted(row for launch in free for row in rows_of(launch)) == expected
    assert [launch.is_wide for launch in free] == [False, True]


def test_long_contexts_of_few_prompt_rows_are_shared_out() -> None:
    """Bugs: thirty rows behind a cached prefix that one program for each kv head reads alone; a row of the first part
    said to have the later ones, whose sums nobody writes; "triton-fixed" cutting what its batch would then decide."""
    inputs, cpu = step((9000, 30), (0, 6)), torch.device("cpu")
    (free,) = launches(inputs, Tiling(4, 512, 8), (0, 0), cpu)
    assert free.tiles[:, -1].tolist() == [2] * 3  # of 16 rows: 11 parts would fill a GPU, 18 splits are 9 pairs
    assert free.num_parts == 9
    assert free.rows[:, 1].tolist() == [9] * 30 + [1] * 6
    (fixed,) = launches(inputs, Tiling(4, 512, 8, fixed=True), (0, 0), cpu)
    assert fixed.tiles[:, -1].tolist() == [18] * (8 + 2)
    assert (fixed.num_parts, fixed.is_wide) == (1, False)


@pytest.mark.parametrize("lengths", [[32768], [32768] * 8, [32768] + [100] * 7, [5000, 300] * 32, [4096] * 256])
def test_parts_of_a_decode_step(lengths: list[int]) -> None:
    """Bugs: parts that a recorded step has no room for, which write over the next row's; a last wave of programs that
    is nearly empty; a long context that one program reads."""
    tiling, cpu = Tiling(4, 256, 8, residents=10), torch.device("cpu")
    (made,) = launches(step(*((length - 1, 1) for length in lengths)), tiling, (0,) * len(lengths), cpu)
    (held,) = launches(step(*((32767, 1) for _ in lengths)), tiling, (0,) * len(lengths), cpu)
    used = made.rows[:, 1]
    assert int(used.max()) <= made.num_parts <= held.num_parts
    assert torch.equal(used, -(-torch.tensor(lengths) // (256 * made.tiles[:, -1])))
    assert int((256 * made.tiles[:, -1]).max()) <= max(1024, 8 * sum(lengths) // 1320 + 512)
    if min(lengths) >= 4096:
        waves = int(used.sum()) * 8 / (132 * 10)
        assert waves > 0.75 * math.ceil(waves)


@pytest.mark.parametrize(
    ("group", "columns", "rows"),
    [(1, (16, 64), (16, 64)), (3, (16, 64), (5, 21)), (7, (16, 64), (2, 9)), (33, (64, 64), (1, 1))],
)
def test_a_tile_holds_whole_rows(group: int, columns: tuple[int, int], rows: tuple[int, int]) -> None:
    """Of decode steps and of prompts."""
    tiling = Tiling(group, 512)
    assert (tiling.columns(False), tiling.columns(True)) == columns
    assert (tiling.rows(False), tiling.rows(True)) == rows


def test_on_a_cpu_they_step_back() -> None:
    """Bug: a GPU served by the reference without a word, because nobody asks for these."""
    cpu, reason = torch.device("cpu"), "triton kernels run on CUDA devices, not on cpu"
    assert f16.KERNELS[1].refuses(AttentionSpec(32, 8, 128, 64, cpu, torch.bfloat16, torch.float16)) == reason
    row = RowLayout(4.0, 128, 64)
    spec = QuantizedSpec(32, 8, ChunkLayout(row, row, 64), cpu, torch.bfloat16)
    assert quantized.KERNELS[1].refuses(spec) == reason
    assert [kernel.name for kernel in f16.KERNELS[1:3]] == ["triton", "triton-fixed"]
    assert [kernel.name for kernel in quantized.KERNELS[1:3]] == ["triton", "triton-fixed"]


def test_refusals_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a kernel chosen that fails at the first step."""
    monkeypatch.setattr(gpu, "MISSING", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda, half = torch.device("cuda"), torch.bfloat16

    def plain(head_dim: int = 128, page_size: int = 64, heads: int = 32, pages: torch.dtype = torch.float16) -> str:
        return str(F16Triton().refuses(AttentionSpec(heads, 8, head_dim, page_size, cuda, half, pages)))

    assert plain() == plain(head_dim=80) == plain(page_size=16) == "None"
    assert "torch.float32 are not float16" in plain(pages=torch.float32)
    assert "pages of 48" in plain(page_size=48)
    assert "head_dim 512 is above 256" in plain(head_dim=512)
    assert "more than 64" in plain(heads=8 * 65)

    def packed(head_dim: int = 128, group: int = 64, bits: float = 4.0, heads: int = 32) -> str:
        row = RowLayout(bits, head_dim, group)
        return str(QuantizedTriton().refuses(QuantizedSpec(heads, 8, ChunkLayout(row, row, 64), cuda, half)))

    assert packed() == packed(head_dim=64, group=32) == packed(bits=1.5) == packed(bits=16.0) == "None"
    assert "head_dim 96 is not a power of two" in packed(head_dim=96, group=32)
    assert "more than 64" in packed(heads=8 * 65)
