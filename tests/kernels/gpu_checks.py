"""What tests of compiled Triton kernels share."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest

from kernels import gpu
from tests.kernels.gpu_compile import Case, compiled

SHARED_MEMORY = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}  # bytes that one program can have
needs_triton = pytest.mark.skipif(gpu.MISSING is not None, reason=str(gpu.MISSING))
OLDEST_INTERPRETER = (3, 9)  # of Triton; 3.6 compiles every kernel, but its interpreter fails with NumPy 2.4


def is_too_old() -> bool:
    return gpu.MISSING is None and tuple(map(int, version("triton").split(".")[:2])) < OLDEST_INTERPRETER


needs_interpreter = pytest.mark.skipif(
    gpu.MISSING is not None or is_too_old(), reason=gpu.MISSING or "the interpreter needs Triton 3.9 or newer"
)


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
