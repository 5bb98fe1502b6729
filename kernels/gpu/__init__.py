"""What the Triton kernels of all families share: when they can run, how codes lie on a GPU, how a call is cut up.

Modules that import triton (linear.py, rows.py) are imported at the first call: triton takes time and memory that a
server on a CPU has no use for.
"""

import importlib.util

import torch

MISSING = None if importlib.util.find_spec("triton") else "triton is not installed: pip install triton"


def device_refusal(device: torch.device) -> str | None:
    """Why no Triton kernel can run on `device`, or None."""
    if device.type != "cuda":
        return f"triton kernels run on CUDA devices, not on {device.type}"
    if MISSING is not None:
        return MISSING
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if torch.version.hip is not None:
        return "triton kernels are compiled and checked for NVIDIA GPUs only"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "triton kernels need compute capability 8.0 or newer, for bfloat16"
    return None


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no Triton kernel can serve activations of `dtype` on `device`, or None."""
    if (reason := device_refusal(device)) is not None:
        return reason
    if dtype != torch.bfloat16:
        return f"triton kernels take bfloat16 activations, not {dtype}"
    return None
