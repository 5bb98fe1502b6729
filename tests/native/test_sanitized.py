"""The C++ kernels under AddressSanitizer and UBSan, on inputs whose memory ends where they end (main.cpp)."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BUILD = HERE.parent.parent / "build" / "sanitized"  # kept, so that only what changed is compiled again


def run(*command: str | Path, seconds: int) -> str:
    """The command's output. Fails with it when the command fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def build() -> Path:
    """The test program. Skips without the tools, and where the compiler has no sanitizers for this machine."""
    cmake, compiler = shutil.which("cmake"), shutil.which("c++")
    if cmake is None or compiler is None:
        pytest.skip("needs cmake and a C++ compiler")
    probe = [compiler, "-fsanitize=address,undefined", "-x", "c++", "-", "-o", os.devnull]
    if subprocess.run(probe, input="int main() {}", text=True, capture_output=True, check=False).returncode != 0:
        pytest.skip(f"{compiler} cannot link with AddressSanitizer and UBSan")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    run(cmake, "-S", HERE, "-B", BUILD, *generator, seconds=60)
    run(cmake, "--build", BUILD, "--parallel", str(os.cpu_count() or 1), seconds=240)
    return BUILD / "native_tests"


@pytest.mark.timeout(600)
def test_every_instruction_set_in_its_own_memory() -> None:
    """Bug: a read or write past a tensor's end, undefined behaviour, or bits that differ between sets or threads."""
    output = run(build(), seconds=200)
    assert output.split() == ["pool", "linear", "int8", "pack", "attention", "quantized", "rows", "sampling"]
