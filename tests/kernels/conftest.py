"""What the native library was told is of one test alone."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from kernels import native

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
