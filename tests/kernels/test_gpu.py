"""The Triton kernels without a GPU: under the interpreter against their references, and compiled within a budget."""

import itertools

import pytest
import torch

from kernels import activation, gpu, norm, rope
from kernels.contract import LinearSpec, RowSpec
from kernels.gpu.configs import CONFIGS, MAX_SPLITS, grid_for
from kernels.gpu.packing import pack_words, packed_refusal, plane_of
from kernels.linear.affine.gpu import AffineTriton
from kernels.linear.bitstream import pack_codes
from kernels.linear.table.gpu import TableTriton
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
    words = pack_words(pack_codes(codes, 4), 4, 200, 32)  # two blocks of 4 planes of 32
    assert words.shape == (3, 32)
    for n in range(3):
        for k in range(200):
            block, plane, i = k // 128, k // 32 % 4, k % 32
            assert int(words[n, block * 16 + i // 2]) >> (16 * (i % 2) + 4 * plane) & 15 == int(codes[n, k])


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
    assert len(splits) == len(CONFIGS) + 1
    assert all(len(found) == 1 for found in splits.values())


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
