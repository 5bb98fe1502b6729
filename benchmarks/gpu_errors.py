"""What the checks of GPU kernels share: how far off a result is, and weights moved to the device."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

Checked = tuple[str, float]  # what, and its error in parts of the bound


def worst(found: Tensor, expected: Tensor, bound: Tensor) -> float:
    """The largest error in parts of its bound; infinite where there is a NaN."""
    parts = (found.double() - expected.double()).abs() / bound.double().clamp_min(1e-300)
    return float(parts.nan_to_num(torch.inf).max())


def differing(found: Tensor, expected: Tensor) -> float:
    """Of results that must be the same to the last bit: twice the number that are not, so that one is above 1."""
    return 2.0 * float((found.cpu() != expected.cpu()).sum())


def placed(holder: Any, device: torch.device) -> Any:
    """A frozen dataclass with its tensors on the device; one number that stands for all still does."""
    moved: dict[str, Any] = {}
    for name, value in vars(holder).items():
        if isinstance(value, Tensor) and 0 in value.stride():
            moved[name] = value[:1, :1].to(device).expand(value.shape)
        elif isinstance(value, Tensor):
            moved[name] = value.to(device)
        elif hasattr(value, "__dataclass_fields__"):
            moved[name] = placed(value, device)
    return replace(holder, **moved)
