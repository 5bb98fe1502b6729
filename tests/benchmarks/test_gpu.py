"""The GPU benchmarks, as far as they go without a GPU."""

import pytest
import torch

from benchmarks import gpu as bench
from benchmarks.gpu import Case, judged
from benchmarks.gpu_instructions import loop_length
from benchmarks.shapes import SMALLEST


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a traceback out of torch in place of what to do."""
    monkeypatch.setattr("sys.argv", ["benchmarks.gpu", "--json"])
    with pytest.raises(SystemExit, match=r"no CUDA device.*docs/gpu\.md"):
        bench.main()


def test_the_cases_of_a_step_can_be_made() -> None:
    """Bug: sizes that disagree, found only on a GPU."""
    cpu = torch.device("cpu")
    cases = [*bench.attention_cases(SMALLEST, 256, cpu), *bench.row_cases(SMALLEST, 3, cpu)]
    assert [case.name for case in cases][:2] == ["torch sdpa bf16", "f16 pages"]
    assert cases[0].num_bytes == cases[1].num_bytes == 8 * 256 * 4 * 64  # sequences, tokens, bytes of a kv head
    sampling = list(bench.sampling_cases(SMALLEST, 3, cpu))
    assert {case.num_bytes for case in sampling} == {4 * 3 * SMALLEST.vocab}
    for case in (cases[0], cases[4], *sampling[:3]):
        case.call()


def test_ratios_are_of_times_taken_in_the_same_trial() -> None:
    """Bug: a ratio of medians, which a clock that changes between trials moves; a share of another's bytes."""
    cases = [Case(name, num_bytes, list) for name, num_bytes in (("bf16", 400), ("w4", 100), ("copy", 1000))]
    trials = [[4.0, 2.0, 5.0], [8.0, 2.0, 5.0], [2.0, 0.5, 5.0]]
    bf16, w4, copy = judged("g", cases, trials)
    assert (bf16.ratio, w4.ratio, w4.lowest, w4.highest) == (1.0, 4.0, 2.0, 4.0)
    assert (w4.microseconds, w4.share, copy.share) == (2000.0, 0.25, 1.0)


def test_the_longest_loop_is_counted() -> None:
    """Bug: a short inner loop, or the padding, which branches to itself, counted in place of the body."""
    assembly = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E R2, [R2] ;
        /*0020*/               @P0 FFMA R3, R2, R2, R3 ;
        /*0030*/              @!P1 BRA 0x20 ;
        /*0040*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0050*/               @P0 BRA 0x10 ;
        /*0060*/                   EXIT ;
        /*0070*/                   BRA 0x70;
    """
    assert loop_length(assembly) == 5
    with pytest.raises(ValueError, match="no loop"):
        loop_length("/*0000*/ EXIT ;")
