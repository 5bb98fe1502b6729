"""The Triton kernels without a GPU: under the interpreter against their references, and compiled within a budget."""

import itertools

import numpy as np
import pytest
import torch

from engine.checkpoint.gguf_blocks import IQ4
from kernels import activation, gpu, norm, rope
from kernels.contract import LinearSpec, RowSpec
from kernels.gpu.codes import as_e2m1, byte_table, e2m1_planes, in_halves
from kernels.gpu.configs import MAX_SPLITS, default_configs, grid_for
from kernels.gpu.packing import pack_words, packed_refusal, plane_of
from kernels.linear.affine.gpu import AffineTriton
from kernels.linear.bitstream import pack_codes
from kernels.linear.table.gpu import TableTriton
from kernels.linear.table.tables import FP4, NF4
from tests.kernels import ptx
from tests.kernels.gpu_checks import check_budget, check_interpreted, check_names, needs_interpreter, needs_triton
from tests.kernels.gpu_compile import BUDGET, Case, cases
from tests.kernels.weights import random_affine


@needs_interpreter
def test_kernels_agree_with_their_references_under_the_interpreter() -> None:
    check_interpreted("interpreted", "interpreted_graphs")


@needs_triton
@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_kernels_compile_within_their_budget(
    case: Case, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a change that makes a kernel spill registers, or ask for more shared memory than there is."""
    check_budget(case, BUDGET, request, monkeypatch)


def test_the_budget_is_of_the_cases_that_exist() -> None:
    check_names(BUDGET, cases())


def test_a_half_word_holds_one_code_of_each_plane() -> None:
    """The layout by its definition; the last block is short. Bug: the top code's sign bit smeared over the others."""
    codes = torch.randint(0, 16, (3, 200), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    words = pack_words(pack_codes(codes, 4), 4, 200, 32, in_halves(4, range(16)))  # two blocks of 4 planes of 32
    assert words.shape == (3, 32)
    for n in range(3):
        for k in range(200):
            block, plane, i = k // 128, k // 32 % 4, k % 32
            assert int(words[n, block * 16 + i // 2]) >> (16 * (i % 2) + 4 * plane) & 15 == int(codes[n, k])


def test_bits_of_e2m1_are_found_where_a_bfloat16_has_them() -> None:
    """Each code of a word alone in its place: PLACES of its half and plane have its bits, those of the others none."""
    added = as_e2m1()
    for j, half, code in itertools.product(range(4), range(2), range(16)):
        planes = e2m1_planes(int(added[j, half, code]) & 0xFFFFFFFF)
        found = [[(plane >> 16 * h & 0x81C0) for h in range(2)] for plane in planes]
        expected = [[0, 0] for _ in range(4)]
        expected[j][half] = (code & 8) << 12 | (code & 7) << 6
        assert found == expected


@pytest.mark.parametrize(
    ("table", "mixed"), [(NF4, False), (FP4, False), (IQ4, True), ((0.5, -3.0, 1e-3), True)], ids=str
)
def test_two_lookups_of_bytes_give_every_entry(table: tuple[float, ...], mixed: bool) -> None:
    """Bug: the sign of the other lookup left in; codes that share a nibble."""
    found = byte_table(table)
    assert found.mixed == mixed
    assert sorted(found.order) == list(range(16))
    data = b"".join(word.to_bytes(4, "little") for word in found.words)
    halves = {0: (data[:8], data[8:16]), 8: (data[16:24], data[24:])}
    for code, value in enumerate(table):
        nibble, bits = found.order[code], 0
        for shift, (first, second) in halves.items():
            this, other = (first, second) if nibble < 8 else (second, first)
            bits |= (this[nibble & 7] ^ (0 if mixed else 255 * (other[nibble & 7] >> 7))) << shift
        entry = torch.tensor(bits - (bits >> 15 << 16), dtype=torch.int16).view(torch.bfloat16)
        assert entry == torch.tensor(value, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("bits", "in_features", "group_size", "plane"),
    [(4, 4096, 128, 64), (4, 896, 128, 32), (4, 4096, 16, 16), (4, 4096, 48, 16), (2, 4096, 128, 32), (8, 45, 45, 32)],
)
def test_planes_stay_inside_groups_and_rows(bits: int, in_features: int, group_size: int, plane: int) -> None:
    """896 channels are 7 blocks of 4 planes of 32, or 4 of 64 with an eighth of them empty."""
    assert plane_of(bits, in_features, group_size) == plane


def test_groups_that_no_plane_divides_are_refused() -> None:
    with pytest.raises(ValueError, match="groups of 24 channels have no packed form"):
        AffineTriton().prepare(random_affine(4, 96, 5, 24, torch.float16, seed=1))


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 9, 16, 56])
@pytest.mark.parametrize("out_features", [1, 1024, 4096, 128256])
def test_splits_cover_all_blocks_and_do_not_depend_on_the_batch(out_features: int, num_blocks: int) -> None:
    """Bug: channels lost by rounding, empty splits, or a row whose bits depend on how many others share its step."""
    splits: dict[tuple[bool, int], set[tuple[int, int]]] = {}
    for num_tokens, fixed in itertools.product((1, 8, 9, 16, 17, 64, 65, 1000), (False, True)):
        grid = grid_for(num_tokens, out_features, num_blocks, fixed)
        assert (grid.num_splits - 1) * grid.blocks_per_split < num_blocks <= grid.num_splits * grid.blocks_per_split
        assert grid.tiles_m * grid.config.block_m >= num_tokens
        assert grid.num_splits <= MAX_SPLITS
        splits.setdefault((fixed, grid.config.block_m), set()).add((grid.num_splits, grid.blocks_per_split))
    assert len(splits) == len(default_configs().entries) + 1
    assert all(len(found) == 1 for found in splits.values())


def test_ptx_means_what_a_gpu_does() -> None:
    """Halves of a fused product: ties to even, subnormals kept. An instruction that is not known is no other one's."""
    a = np.array(
        [0x3F80C000, 0x00013F81, 0x00403F83], np.uint32
    )  # 1 and -2; 2^-133 and 1 + 2^-7; 2^-127 and 1 + 3 2^-7
    by = np.array([0xC000, 0x3F81, 0x7E80], np.uint32)  # -2, 1 + 2^-7, 2^126
    add = np.array([0x3F80C000, 0x80008000, 0x80008000], np.uint32)
    found = ptx.run("{.reg .b32 h; mov.b32 h, {$2, $2}; fma.rn.bf16x2 $0, $1, h, $3;}", [a, by, add])
    assert [hex(word) for word in found.tolist()] == ["0xbf804000", "0x13f82", "0x3f007e83"]
    with pytest.raises(ValueError, match=r"mul\.rn\.bf16x2 of 2 operands"):
        ptx.run("mul.rn.bf16x2 $0, $1, $2;", [a, a])


def test_refusals_say_why() -> None:
    """On a CPU every Triton kernel steps back, whatever is installed."""
    spec = LinearSpec(64, 64, torch.device("cpu"), torch.bfloat16, "4-bit", 4, 32)
    reason = "triton kernels run on CUDA devices, not on cpu"
    assert AffineTriton().refuses(spec) == TableTriton().refuses(spec) == packed_refusal(spec) == reason
    for kernels in (norm.KERNELS, rope.KERNELS, activation.KERNELS):
        (kernel,) = (kernel for kernel in kernels if kernel.name == "triton")
        assert kernel.refuses(RowSpec(64, torch.device("cpu"), torch.bfloat16)) == reason


def test_refusals_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a kernel chosen that fails at the first step."""
    monkeypatch.setattr(gpu, "MISSING", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.refusal(torch.device("cuda"), torch.bfloat16) == "torch finds no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    device = torch.device("cuda")
    assert packed_refusal(LinearSpec(96, 64, device, torch.bfloat16, "4-bit", 4, 32)) is None
    assert "24 channels" in str(packed_refusal(LinearSpec(96, 64, device, torch.bfloat16, "4-bit", 4, 24)))
    assert "not torch.float16" in str(gpu.refusal(device, torch.float16))
    assert "32768 elements" in str(norm.KERNELS[1].refuses(RowSpec(32768, device, torch.bfloat16)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0 or newer" in str(gpu.refusal(device, torch.bfloat16))
    monkeypatch.setattr(gpu, "MISSING", "triton is not installed")
    assert gpu.refusal(device, torch.bfloat16) == "triton is not installed"
