"""Activations rounded the way a checkpoint's format says, before they meet its weights (W8A8, W4A8, FP8, NVFP4, MXFP4).

    x^ = scale * (code(x / scale + zero) - zero)

A format that was calibrated with rounded activations means x^; what our own kernels round for speed is theirs.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

E4M3_MAX = 448.0
E2M1_MAX = 6.0
SMALLEST = 0.125  # of e4m3 group scales that are not 0, as compressed-tensors and ModelOpt keep them
GAUSSIAN = 2.92247856 / 6  # of a standard deviation: the scale at which e2m1 rounds normal values best (QuEST)
LEAST = 1e-8  # added to what FP-Quant takes the power of two of
MX_ROUND = 1 << 21  # added to a float32: the exponent of a peak goes up from 1.75 times a power of two on


@dataclass(frozen=True)
class Rounding:
    """One rule. Scales are fixed by the checkpoint, or follow the largest activation of each group of channels.

    A transform of the input that is no linear map: apply_transposed, which takes weights, leaves them alone. Raises
    ValueError when the fields contradict each other.
    """

    grid: Literal["int", "e4m3", "e2m1"]  # what codes are
    bits: int  # of a code
    channels: int | None = None  # that share a scale; None: all of a token
    symmetric: bool = True  # zero is 0; otherwise it follows the smallest activation
    scale: Tensor | None = None  # [1] float32, of every activation; None: it follows the group
    zero: Tensor | None = None  # [1] float32, beside `scale`
    # What scales that follow the group are rounded to. FP-Quant takes powers of two from below: a third of that of the
    # peak, or that of a share of the standard deviation (QuEST).
    scale_grid: Literal["float", "e4m3", "e8m0", "e8m0-up", "e8m0-third", "e8m0-deviation"] = "float"
    scale_unit: Tensor | None = None  # [1] float32, what e4m3 scales are multiples of (NVFP4)

    def __post_init__(self) -> None:
        if self.grid != "int" and not (self.symmetric and self.zero is None):
            raise ValueError(f"{self.grid} activations have no zero point")
        if (self.scale_unit is not None) != (self.scale_grid == "e4m3"):
            raise ValueError("scales in e4m3, and only they, need a unit")
        if not 2 <= self.bits <= 8:
            raise ValueError(f"activations of {self.bits} bits cannot be served, only 2 to 8")
        low, high = self.bounds
        if self.zero is not None and not low <= float(self.zero) <= high:
            raise ValueError(
                f"the zero point of {self.bits}-bit activations is {low:g} to {high:g}, not {float(self.zero):g}"
            )

    @property
    def width(self) -> None:
        return None

    @property
    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest code."""
        if self.grid == "int":
            return -(2.0 ** (self.bits - 1)), 2.0 ** (self.bits - 1) - 1
        highest = E4M3_MAX if self.grid == "e4m3" else E2M1_MAX
        return -highest, highest

    def describe(self) -> str:
        """What the start screen shows: "int8 activations"."""
        return f"{f'int{self.bits}' if self.grid == 'int' else self.grid} activations"

    def apply(self, x: Tensor) -> Tensor:
        """x: [num_tokens, width] -> x^, x's dtype."""
        width, num_channels = x.shape[-1], self.channels or x.shape[-1]
        padded = torch.nn.functional.pad(x.float(), (0, -width % num_channels))
        num_groups = padded.shape[-1] // num_channels
        groups = padded.view(*x.shape[:-1], num_groups, num_channels)  # [num_tokens, groups, channels]
        scale, zero = self._scale(groups)
        codes = self._codes(groups / scale + zero)
        return ((codes - zero) * scale).flatten(-2)[..., :width].to(x.dtype)

    def apply_transposed(self, x: Tensor) -> Tensor:
        return x

    def _scale(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zeros that broadcast over groups [num_tokens, groups, channels]."""
        zero = groups.new_zeros(1)
        if self.scale is not None:
            return self.scale, zero if self.zero is None else self.zero
        low, high = self.bounds
        if not self.symmetric:
            lowest, highest = groups.amin(-1, keepdim=True).clamp_max(0), groups.amax(-1, keepdim=True).clamp_min(0)
            scale = _not_zero((highest - lowest) / (high - low))
            return scale, (low - lowest / scale).clamp(low, high).round()
        if self.scale_grid == "e8m0-deviation":
            return _floor_power_of_two(GAUSSIAN * _deviation(groups) + LEAST), zero
        peak = groups.abs().amax(-1, keepdim=True)  # [num_tokens, groups, 1]
        if self.scale_grid == "e8m0-third":
            return _floor_power_of_two(peak + LEAST) / 3, zero
        if self.scale_grid == "e8m0":
            return _power_of_two(peak, high), zero
        scale = peak / ((high - low) / 2)
        if self.scale_grid == "e8m0-up":
            return _next_power_of_two(_not_zero(scale)), zero
        if self.scale_unit is None:
            return _not_zero(scale), zero
        kept = (scale / self.scale_unit).clamp_max(E4M3_MAX).to(torch.float8_e4m3fn).float()
        return torch.where(kept == 0, SMALLEST, kept) * self.scale_unit, zero

    def _codes(self, scaled: Tensor) -> Tensor:
        low, high = self.bounds
        clamped = scaled.clamp(low, high)
        if self.grid == "int":
            return clamped.round()
        if self.grid == "e4m3":
            return clamped.to(torch.float8_e4m3fn).float()
        magnitude = clamped.abs()
        step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))  # between neighbours of e2m1
        return (clamped / step).round() * step


def _not_zero(scale: Tensor) -> Tensor:
    """A group of zeros has no scale; any will do."""
    return torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)


def _next_power_of_two(scale: Tensor) -> Tensor:
    """2^ceil(log2 scale) (DeepSeek's ue8m0)."""
    mantissa, exponent = torch.frexp(scale)  # scale = mantissa 2^exponent, mantissa from 0.5 to 1
    return torch.ldexp(torch.ones_like(scale), torch.where(mantissa == 0.5, exponent - 1, exponent))


def _floor_power_of_two(size: Tensor) -> Tensor:
    """2^floor(log2 size)."""
    _, exponent = torch.frexp(size)  # size = mantissa 2^exponent, mantissa from 0.5 to 1
    return torch.ldexp(torch.ones_like(size), exponent - 1)


def _deviation(groups: Tensor) -> Tensor:
    """The standard deviation of each group, [num_tokens, groups, 1]."""
    num_channels = groups.shape[-1]
    mean = _sum(groups) / num_channels
    return (_sum(groups.square()) / num_channels - mean.square()).clamp_min(0).sqrt()


def _sum(groups: Tensor) -> Tensor:
    """Over the last dimension, halves onto halves: an order that no batch changes. [..., channels] -> [..., 1]"""
    while (width := groups.shape[-1]) > 1:
        if width % 2:
            groups, width = torch.nn.functional.pad(groups, (0, 1)), width + 1
        groups = groups[..., : width // 2] + groups[..., width // 2 :]
    return groups


def _power_of_two(peak: Tensor, highest: float) -> Tensor:
    """2^(e - e_max), e the exponent of the peak and e_max that of the highest code; at least 2^-126."""
    exponent = (peak.view(torch.int32) + MX_ROUND >> 23) - 127
    largest = torch.tensor(highest).log2().floor().int()
    return torch.ldexp(torch.ones_like(peak), (exponent - largest).clamp_min(-126))
