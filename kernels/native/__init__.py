"""The C++ kernels, for every native back end: the extension module when it was built, the reason when it was not.

The module is built with the package. Without a C++20 compiler the package installs all the same, without it.
"""

import importlib.util

import torch

INTERFACE = 8  # of the module that these sources call: one more here and in module.cpp whenever a binding changes

try:
    from kernels.native import _native

    MISSING: str | None = None
    if getattr(_native, "INTERFACE", None) != INTERFACE:
        MISSING = "the C++ kernels are of another version of Nibble: install Nibble again"
except ImportError as error:
    if importlib.util.find_spec("kernels.native._native") is None:  # its own message speaks of circular imports
        MISSING = "the C++ kernels are not built: install a C++20 compiler and install Nibble again"
    else:
        MISSING = f"the C++ kernels cannot be loaded: {error}. Install Nibble again"

__all__ = ["MISSING", "isa", "read_bandwidth", "refusal", "set_num_threads"]


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no native kernel can serve activations of `dtype` on `device`, or None."""
    if MISSING is not None:
        return MISSING.partition(":")[0]  # the start screen says the rest once
    if device.type != "cpu":
        return f"native kernels run on the CPU, not on {device.type}"
    if dtype != torch.float32:
        return f"native kernels take float32 activations, not {dtype}"
    return None


def isa() -> str | None:
    """The instruction set in use: "avx512", "avx2" or "scalar"; None without the library."""
    return _native.isa() if MISSING is None else None


def read_bandwidth(num_threads: int) -> float | None:
    """Bytes per second that `num_threads` can read from memory, measured now (0.3 s); None without the library."""
    return _native.read_bandwidth(num_threads) if MISSING is None else None


def set_num_threads(num_threads: int) -> None:
    """Threads of the native kernels' own pool; no effect without them.

    Raises ValueError below 1, RuntimeError when the system cannot start so many.
    """
    if MISSING is None:
        _native.set_num_threads(num_threads)
