"""What every native kernel refuses before it takes an address: an address does not say what lies there."""

import torch
from torch import Tensor

FLOAT32 = (torch.float32,)
INT64 = (torch.int64,)


def check_memory(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...] = FLOAT32) -> None:
    """Raise ValueError, naming what was found, unless `tensor` is of one of `dtypes` and on the CPU."""
    if tensor.dtype not in dtypes or not tensor.is_cpu:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        found = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{name} must be {allowed} on the CPU, found {found} on {tensor.device}")
