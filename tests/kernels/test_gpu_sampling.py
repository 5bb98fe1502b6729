"""Sampling in Triton without a GPU: interpreted, compiled within a budget, and what it is handed."""

import pytest
import torch

from kernels import gpu
from kernels.contract import Filters, RowDraw, RowSpec
from kernels.sampling.gpu import SamplingTriton, fields_of
from tests.kernels.gpu_checks import check_budget, check_interpreted, check_names, needs_interpreter, needs_triton
from tests.kernels.gpu_compile import Case
from tests.kernels.gpu_sampling_compile import BUDGET, cases


@needs_interpreter
def test_kernels_agree_with_their_reference_under_the_interpreter() -> None:
    check_interpreted("interpreted_sampling")


@needs_triton
@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_kernels_compile_within_their_budget(
    case: Case, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: more ids sorted, or more buckets counted, than a thread has registers for."""
    check_budget(case, BUDGET, request, monkeypatch)


def test_the_budget_is_of_the_cases_that_exist() -> None:
    check_names(BUDGET, cases())


def test_a_draw_as_numbers() -> None:
    """Bug: a top_k that no integer of the kernel holds; greedy taken for a temperature of 1."""
    assert fields_of(RowDraw(3, None, 0.5), 100) == (3, 0.0, 0, 1.0, 0.0, 0.0)
    assert fields_of(RowDraw(3, Filters(0.7, 2**40, 0.9, 0.1), 0.5), 100) == (3, 0.7, 100, 0.9, 0.1, 0.5)


def test_refusals_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a kernel chosen that fails at the first step."""
    spec = RowSpec(1000, torch.device("cpu"), torch.float32)
    assert SamplingTriton().refuses(spec) == "triton kernels run on CUDA devices, not on cpu"
    monkeypatch.setattr(gpu, "MISSING", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for vocab, reason in ((262_144, None), (262_145, "a vocabulary of 262,145 ids is above 262,144")):
        assert SamplingTriton().refuses(RowSpec(vocab, torch.device("cuda"), torch.float32)) == reason
