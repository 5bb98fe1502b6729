"""The extension module itself: that it is there, what it runs on, and what is said when it is not."""

import shutil
import subprocess
import sys

import pytest
import torch

from kernels import native
from kernels.contract import LinearSpec, select
from kernels.linear.registry import kernels_for


def test_it_is_built_where_there_is_a_compiler() -> None:
    """Bug: a mistake in the C++ sources that the install passes over, so that everything runs on reference kernels."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    assert native.MISSING is None


def test_an_instruction_set_that_does_not_exist_is_refused() -> None:
    if native.MISSING is not None:
        pytest.skip(native.MISSING)
    from kernels.native import _native

    assert _native.supported_isas()[-1] == "scalar"
    assert _native.isa() in _native.supported_isas()
    with pytest.raises(ValueError, match=r"'mmx' is not one of .*scalar"):
        _native.use_isa("mmx")


def test_threads_are_counted_with_the_caller_and_come_and_go() -> None:
    """Bug: a pool that keeps workers of an earlier setting, or takes 0 for all."""
    if native.MISSING is not None:
        pytest.skip(native.MISSING)
    from kernels.native import _native

    before = _native.num_threads()
    for count in (3, 1, 2, before):
        native.set_num_threads(count)
        assert _native.num_threads() == count
    with pytest.raises(ValueError, match="at least 1"):
        native.set_num_threads(0)


WITHOUT = """
import sys
sys.modules["kernels.native._native"] = None  # what an import finds where nothing was built
import torch
from kernels import native
from kernels.contract import LinearSpec, select
from kernels.linear.registry import kernels_for
native.set_num_threads(2)
assert native.isa() is None and native.read_bandwidth(1) is None
spec = LinearSpec(64, 64, torch.device("cpu"), torch.float32, "4-bit", 4, 32)
for family in ("affine", "dense", "table"):
    print(select(kernels_for(family), spec))
print(native.MISSING)
"""


def test_without_it_the_reference_runs_and_says_what_to_do() -> None:
    """Bug: an install without a compiler that does not even start, or is slow and does not say why."""
    result = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    *choices, advice = result.stdout.splitlines()
    for choice in choices:
        assert choice.startswith("reference (native: the C++ kernels are not built")
    assert advice == "the C++ kernels are not built: install a C++20 compiler and install Nibble again"


TOO_MANY = """
import resource
from pathlib import Path
from kernels import native
from kernels.native import _native
native.set_num_threads(2)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
_, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), hard))  # stacks of some thirty threads
try:
    native.set_num_threads(5000)
except RuntimeError as error:
    print(error)
print(_native.num_threads())
"""


@pytest.mark.skipif(native.MISSING is not None or sys.platform != "linux", reason="needs the C++ kernels on Linux")
def test_more_threads_than_the_system_gives_are_refused() -> None:
    """Bug: a thread that cannot start ends the process, or leaves half of them and a wrong count."""
    result = subprocess.run([sys.executable, "-c", TOO_MANY], capture_output=True, text=True, check=False, timeout=60)
    assert result.stdout.splitlines() == ["cannot start 5000 threads: lower --threads", "2"], result.stderr


OF_ANOTHER_VERSION = """
import sys, types
sys.modules["kernels.native._native"] = types.ModuleType("_native")  # has none of the functions called today
import torch
from kernels import native
native.set_num_threads(2)
assert native.isa() is None
print(native.refusal(torch.device("cpu"), torch.float32))
"""


def test_a_module_of_another_version_is_not_called() -> None:
    """Bug: new sources over an old build end in an AttributeError somewhere in the first step."""
    result = subprocess.run([sys.executable, "-c", OF_ANOTHER_VERSION], capture_output=True, text=True, check=False)
    assert result.stdout == "the C++ kernels are of another version of Nibble\n", result.stderr


def test_another_dtype_is_refused_with_the_reason() -> None:
    spec = LinearSpec(64, 64, torch.device("cpu"), torch.bfloat16, "4-bit", 4, 32)
    choice = select(kernels_for("affine"), spec)
    assert choice.kernel.name == "reference"
    assert native.MISSING is not None or "take float32 activations" in choice.refusals[0]
