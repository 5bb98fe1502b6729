"""The GPU benchmarks, as far as they go without a GPU."""

from types import ModuleType

import pytest
import torch

from benchmarks import gpu, gpu_check, gpu_model, gpu_tune, loading, serving
from benchmarks.gpu_instructions import longest_loop
from tests.kernels.gpu_checks import check_interpreted, needs_interpreter


@needs_interpreter
def test_every_case_and_every_check_can_be_made_under_the_interpreter() -> None:
    check_interpreted("interpreted_benchmarks")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(
    ("module", "purpose"), [(gpu, "time"), (gpu_check, "check"), (gpu_model, "time")], ids=["gpu", "check", "model"]
)
def test_without_a_gpu_it_says_so(
    module: ModuleType, purpose: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: a traceback out of torch in place of what to do. What groups there are can be asked all the same."""
    monkeypatch.setattr("sys.argv", ["benchmarks"])
    with pytest.raises(SystemExit, match=rf"no CUDA device.* to {purpose} .*docs/benchmarks\.md"):
        module.main()
    monkeypatch.setattr("sys.argv", ["benchmarks", "--list"])
    module.main()
    assert len(capsys.readouterr().out.splitlines()) > 5


@pytest.mark.parametrize("module", [serving, loading], ids=["serving", "loading"])
def test_without_a_gpu_no_checkpoint_is_written_for_one(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: gigabytes of random weights, and after a minute a traceback out of the engine's process."""
    monkeypatch.setattr("sys.argv", ["benchmarks", "--shape", "llama-3-8b", "--device", "cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module, "write_checkpoint", lambda *_: pytest.fail("a checkpoint is written"))
    with pytest.raises(SystemExit, match="no CUDA device"):
        module.main()


@pytest.mark.parametrize("listed", [[], ["--list"]], ids=["run", "list"])
@pytest.mark.parametrize("module", [gpu, gpu_check, gpu_model, gpu_tune], ids=["gpu", "check", "model", "tune"])
def test_groups_that_there_are_not_are_refused_first(
    module: ModuleType, listed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a misspelt group that is found only on a machine with a GPU, while it is lent."""
    monkeypatch.setattr("sys.argv", ["benchmarks", "--only", "nosuch", *listed])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no group begins with 'nosuch'"):
        module.main()


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
    assert len(longest_loop(assembly)) == 5
    with pytest.raises(ValueError, match="no loop"):
        longest_loop("/*0000*/ EXIT ;")
