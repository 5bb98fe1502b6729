"""The benchmark of whole models on a GPU, on one that is not there (tests/engine/fake_cuda.py)."""

from collections.abc import Sequence

import pytest
import torch

from benchmarks import gpu_check, gpu_model, gpu_random
from benchmarks.gpu_model import Bench, Extent, groups
from benchmarks.gpu_timing import Case, copy_case
from benchmarks.shapes import Shape
from benchmarks.workers import Line
from tests.engine.fake_cuda import OnGpu, fake_cuda
from tests.kernels.gpu_checks import needs_triton

pytestmark = needs_triton

SMALL = Extent(
    shape=Shape(64, 128, 1, 2, 1, 64, 96, False),
    batches=(1, 3),
    contexts=(70,),
    full_context=100,
    most_full=2,
    prompts=((40, 16),),
    requests=(2, 20, 5),
    num_rounds=1,
    num_steps=1,
)
CHOSEN = (  # every verb, every model and every kind of cache
    "decode w4 f16",
    "prompt w4 k4v4:w128:s4",
    "full w4 skvq:k2v2:w128:s4",
    "engine w4 k4v4:w128:s4",
    "decode bf16 f16",
    "prompt w4 fixed k4v4:w128:s4",
)


@pytest.fixture(autouse=True)
def _no_collecting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of garbage, which takes longer than all else here."""
    for module in (gpu_model, gpu_random):
        monkeypatch.setattr(module, "release", lambda: None)


class Once:
    def milliseconds(self, calls: Sequence[Case]) -> list[float]:
        for case in calls:
            case.call()
        return [2.0] * len(calls)

    def wait(self) -> None: ...


def test_every_kind_of_group_has_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: tensors of two devices, sizes that disagree or a plan that lets nobody in, first met on a GPU that is lent
    for minutes; weights on the host."""
    with fake_cuda(monkeypatch):
        bench = Bench(SMALL, torch.device("cuda"), Once())
        bench.copy = copy_case(bench.device, 64)
        lines: list[Line] = []
        for name in CHOSEN:
            groups(bench)[name](lines.append)
        assert not [line for line in lines if "error" in line]
        assert {line["group"] for line in lines} == set(CHOSEN)
        (model,) = bench.models.held.values()
        (bound,) = model.model.head.terms  # of the last kind
        assert isinstance(bound.prepared.words, OnGpu)
    step = next(line for line in lines if line["group"] == "decode w4 f16" and line["batch"] == 3)
    weights = 64 * (64 + 2 * 64 + 64) + 3 * 64 * 128
    assert step["step_bytes"] >= weights // 2 + 64 * 96 + 3 * 70 * 4 * 64
    assert step["tok_per_s"] == 1500.0


def test_what_does_not_fit_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a lease that ends with an out-of-memory error at the third of twelve sizes."""
    monkeypatch.setattr(gpu_model, "SPARE", 1e-9)
    with fake_cuda(monkeypatch):
        bench = Bench(SMALL, torch.device("cuda"), Once())
        lines: list[Line] = []
        groups(bench)["decode w4 f16"](lines.append)
    assert [line["batch"] for line in lines] == [1, 3]
    assert all(line["error"].startswith("MemoryError: the cache takes") for line in lines)


def test_recorded_steps_can_be_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: as above. What is computed there is zeros, which are the same."""
    with fake_cuda(monkeypatch):
        errors = dict(gpu_check.check_steps(gpu_check.Extent(steps=3), torch.device("cuda")))
    assert len(errors) == 3 * 4
    assert not any(errors.values())
