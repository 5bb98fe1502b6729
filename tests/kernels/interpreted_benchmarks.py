"""The GPU benchmarks, every group of them, under Triton's interpreter: tests/benchmarks/test_gpu.py runs this file in a
process of its own. Nothing is timed, and sizes are the smallest that have every part."""

import importlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend
from torch.nn.attention.bias import CausalBias

from benchmarks import gpu as bench
from benchmarks import gpu_check
from benchmarks.gpu_timing import Case, Timing, copy_case
from benchmarks.shapes import Shape
from benchmarks.workers import Line
from kernels.linear.table.tables import E2M1
from kernels.sampling.gpu import SamplingTriton
from tests.kernels.weights import random_affine, random_table

CPU = torch.device("cpu")
SHAPE = Shape(128, 128, 1, 2, 1, 64, 144, True)
LEFT_OUT = {"torch int4 g128", "sdpa cudnn", "sdpa efficient"}  # of GPUs alone


@pytest.fixture(autouse=True)
def _products_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in tests/kernels/interpreted.py, and those of float16 and int8 beside them."""
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    plain = interpreter.InterpreterBuilder.create_dot

    def dot(builder: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if a.data.dtype != np.uint16:
            return plain(builder, a, b, d, *rest)
        wide = [(operand.data.astype(np.uint32) << 16).view(np.float32) for operand in (a, b)]
        return interpreter.TensorHandle(np.matmul(*wide) + d.data, d.dtype.scalar)

    convert = interpreter._convert_float

    def nearest(data: Any, source: Any, target: Any, mode: Any) -> Any:
        """Half to even, where the interpreter cuts off; what is subnormal is misread by it."""
        if str(source) == "bf16" and str(target) == "fp32":
            return data.astype(np.uint32) << 16
        if str(source) != "fp32" or str(target) != "bf16":
            return convert(data, source, target, mode)
        bits = np.ascontiguousarray(data).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", nearest)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


class Once:
    """In place of a clock: looks, once, at what every case gives."""

    def __init__(self) -> None:
        self._seen: list[Case] = []

    def trial(self, cases: Sequence[Case]) -> list[float]:
        for case in cases:
            found = None if case in self._seen else case.call()
            self._seen.append(case)
            for one in found if isinstance(found, tuple) else (found,):
                assert not isinstance(one, Tensor) or not one.is_floating_point() or bool(one.isfinite().all())
        return [1.0] * len(cases)

    def wait(self) -> None: ...


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a vocabulary that the interpreter sorts in a moment; FlexAttention as it is, not compiled."""
    for module in (bench, gpu_check):
        monkeypatch.setattr(module, "SamplingTriton", partial(SamplingTriton, 16, 64))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(bench, "POLICIES", ("k4v4:w32:s4",))
    monkeypatch.setattr(gpu_check, "POLICIES", ("k4v4:w32:s4",))
    monkeypatch.setattr(gpu_check, "RULES", gpu_check.RULES[:1] + gpu_check.RULES[-1:])
    monkeypatch.setattr(bench, "SAMPLERS", {name: bench.SAMPLERS[name] for name in ("greedy", "top-k 50")})


@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
def test_every_case_of_every_group_can_be_called() -> None:
    """Bug: sizes that disagree, or a name that is not there, first met in the minutes in which a GPU is lent."""
    extent = bench.Extent(rows=(2,), steps=((1, 48),), prompts=((3, 32),), op_rows=(2,), draws=(2,))
    timing, lines = Timing(Once(), copy_case(CPU, 1000), 1), list[Line]()
    every = bench.groups(SHAPE, CPU, extent)
    for make in every.values():
        timing.run(make(), lines.append)
    assert {line["name"] for line in lines if "error" in line} <= LEFT_OUT
    assert {line["group"] for line in lines} == every.keys()
    assert not [line for line in lines if line.get("ratio", 0) is None]


def test_flash_gets_no_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: a mask that flash refuses, so that torch's fastest is not there to compare with; another last column."""
    masks: list[Any] = []
    monkeypatch.setattr(functional, "scaled_dot_product_attention", lambda *given, **_: masks.append(given[3]))
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        bench.sdpa(bench.Attended(SHAPE, 1, 3, 32, CPU), "sdpa", backend).call()
    assert isinstance(masks[0], CausalBias)
    assert torch.equal(masks[0]._materialize(), masks[1])


def test_every_check_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: as above; a check that finds nothing wrong where something is."""

    def matrices(n: int, k: int) -> dict[str, Any]:
        return {
            "4": partial(random_affine, 4, k, n, 32, torch.float16, 1),
            "e2m1": partial(random_table, E2M1, k, n, 16, torch.float8_e4m3fn, 2),
        }

    monkeypatch.setattr(gpu_check, "matrices", matrices)
    extent = gpu_check.Extent(
        rows=(2, 17), lengths=(), long=((70, 1),), far_bytes=(1 << 19, 1 << 19), stored=3, num_draws=2, family=(64, 16)
    )
    lines: list[Line] = []
    every = gpu_check.checks(SHAPE, extent, CPU)
    every.pop("steps")  # needs a device: tests/benchmarks/test_gpu_model.py
    for name, check in every.items():
        gpu_check.run(name, check, lines.append)
    assert not [line for line in lines if "error" in line]
    assert sum(line["checked"] for line in lines) > 15
    gpu_check.run("broken", lambda: iter([("a", 0.5), ("b", float("nan"))]), lines.append)
    assert lines[-2]["error"] == "off"
