"""What the native library was told is of one test alone; what Triton's interpreter lacks, every test has."""

import importlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from kernels import native
from tests.kernels.ptx import create_inline_asm

if native.MISSING is None or TYPE_CHECKING:
    from kernels.native import _native


@pytest.fixture(autouse=True)
def settings_as_before() -> Iterator[None]:
    """Bug: a test that chooses an instruction set, or more threads, decides how all tests after it run."""
    if native.MISSING is not None:
        yield
        return
    isa, num_threads = _native.isa(), _native.num_threads()
    yield
    _native.use_isa(isa)
    _native.set_num_threads(num_threads)


@pytest.fixture(autouse=True)
def inline_assembly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under TRITON_INTERPRET=1 the PTX of our kernels means what it does on a GPU."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        interpreter: Any = importlib.import_module("triton.runtime.interpreter")
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", create_inline_asm)
