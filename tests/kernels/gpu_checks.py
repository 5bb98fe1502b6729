"""What tests of Triton kernels without a GPU share."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import pytest

from kernels import gpu
from tests.kernels.gpu_compile import Case, compiled

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}  # bytes that one program can have
needs_triton = pytest.mark.skipif(gpu.MISSING is not None, reason=str(gpu.MISSING))
OLDEST_INTERPRETER = (3, 9)  # of Triton; 3.6 compiles every kernel, but its interpreter fails with NumPy 2.4


def is_too_old() -> bool:
    return gpu.MISSING is None and tuple(map(int, version("triton").split(".")[:2])) < OLDEST_INTERPRETER


needs_interpreter = pytest.mark.skipif(
    gpu.MISSING is not None or is_too_old(), reason=gpu.MISSING or "the interpreter needs Triton 3.9 or newer"
)


def check_interpreted(*names: str) -> None:
    """Run files of tests/kernels under Triton's interpreter, in a process of their own: Triton reads TRITON_INTERPRET
    when it is imported."""
    files = [f"tests/kernels/{name}.py" for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


def check_names(path: Path, cases: Iterable[Case]) -> None:
    """The file at `path` has the cases that exist, in their order."""
    assert list(json.loads(path.read_text())["cases"]) == [str(case) for case in cases]


def check_budget(case: Case, path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile, and compare with the file at `path`. What did not change since the last run is taken from the compiler's
    own cache."""
    import triton

    assert request.config.cache is not None
    monkeypatch.setattr(triton.knobs.cache, "dir", str(request.config.cache.mkdir("triton")))
    budget = json.loads(path.read_text())
    used = compiled(case)
    assert used.shared <= SHARED_MEMORY[case.architecture]
    if not triton.__version__.startswith(budget["triton"] + "."):
        pytest.skip(f"the budget is that of Triton {budget['triton']}, found {triton.__version__}")
    registers, stack, shared = budget["cases"][str(case)]
    assert used.stack <= stack == 0
    assert used.registers <= registers
    assert used.shared <= shared
