"""What every Triton kernel on rows refuses before it takes an address."""

import torch
from torch import Tensor


def check_memory(name: str, tensor: Tensor, like: Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
    """Raise ValueError, naming what was found, unless `tensor` is of `dtype` and on the device of `like`."""
    if tensor.dtype != dtype or tensor.device != like.device:
        wanted, found = (str(kind).removeprefix("torch.") for kind in (dtype, tensor.dtype))
        raise ValueError(f"{name} must be {wanted} on {like.device}, found {found} on {tensor.device}")
