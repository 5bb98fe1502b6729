"""The quantizer: one token's keys or values of one head -> codes, scales and zeros -> back.

For every group of g channels of one (token, kv head), all in float32 with each operation rounded by itself (no fused
multiply-add), rounding half to even:

    x       saturated to +-65504, as a float16 cache saturates
    lo, hi  min, max of the group, clipped by alpha:
              origin   alpha min, alpha max                                    SKVQ (arXiv 2405.06219)
              mid      mid -+ alpha half,  mid = (min + max) / 2,  half = (max - min) / 2
            The mid clip keeps a group whose values share a sign inside its range; origin moves such a range towards 0.
    s       enc((hi - lo) / max_code / ps), at least the smallest positive value, so that a division by it is defined
    z       enc(lo / ps)
    code    round(clamp((x / ps - z) / s, 0, max_code))          with the s and z that will be read
    x^      (code s + z) ps

`enc` rounds to float8 e4m3 (float16 at 8 bits), saturating, without a negative zero. SKVQ's published code quantizes
with the s and z before rounding. Taking them as they will be read halves the squared error at 4 bits (0.48 on normal
data, groups of 64): rounding moves a scale by up to a sixteenth, which the largest code multiplies by 15.

`ps` is a power of two for each (layer, head). e4m3 has the same relative precision from 2^-6 to 448, so that all a
prescale can do is move a head's values into that range, and a power of two moves them without an error of its own:
x / ps, s ps and z ps are exact, and with e4m3 so is all of x^ (|code s + z| < 2^13 in steps of 2^-9).

A group with a NaN decodes to NaN in all its channels (codes 0, s = z = NaN): a broken model stays visible, as it does
in a float16 cache. Infinities saturate. A group of one value decodes to z ps, plus at most max_code smallest scales.

16 bits are float16 as they are: no groups, no clip, no prescale.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.attention.quantized.layout import RowLayout, split_last
from kernels.attention.quantized.packing import pack, unpack

LIMIT = 65504.0  # the largest float16
CLIP_MODES = ("mid", "origin")


@dataclass(frozen=True)
class RowCodec:
    """The quantizer of keys, or of values, of one layer."""

    layout: RowLayout
    clip: Tensor  # [num_kv_heads, num_groups] float32, alpha in (0, 1]
    prescale: Tensor  # [num_kv_heads] float32, powers of two
    mode: str = "mid"

    def __post_init__(self) -> None:
        """Raises ValueError, naming the field, when one has another shape or value."""
        num_heads = self.prescale.shape[0]
        if tuple(self.clip.shape) != (num_heads, self.layout.num_groups):
            expected = [num_heads, self.layout.num_groups]
            raise ValueError(f"clip has shape {list(self.clip.shape)}, expected [num_kv_heads, num_groups] {expected}")
        if self.mode not in CLIP_MODES:
            raise ValueError(f"clip mode {self.mode!r} is not one of {', '.join(CLIP_MODES)}")
        if not bool(((self.clip > 0) & (self.clip <= 1)).all()):
            raise ValueError("clip must be above 0 and at most 1")
        if not bool((self.prescale > 0).all()) or bool((torch.frexp(self.prescale).mantissa != 0.5).any()):
            raise ValueError("prescale must be a power of two for every head")

    @property
    def num_heads(self) -> int:
        return self.prescale.shape[0]

    def to(self, device: torch.device) -> "RowCodec":
        return replace(self, clip=self.clip.to(device), prescale=self.prescale.to(device))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [..., num_kv_heads, D] float32 -> bytes of the row [..., num_kv_heads, row_bytes] and of its parameters
        [..., num_kv_heads, num_parameters, bytes of one], both uint8."""
        if self.layout.bits == 16:
            rows = x.clamp(-LIMIT, LIMIT).to(torch.float16).contiguous().view(torch.uint8)
            return rows, rows.new_empty((*x.shape[:-1], 0, 1))
        codes, scales, zeros = self.quantize(x)
        parameters = torch.cat((scales, zeros), dim=-1).unsqueeze(-1)
        return pack(codes, self.layout), parameters.view(torch.uint8)

    def decode(self, rows: Tensor, parameters: Tensor) -> Tensor:
        """The inverse of `encode`, rounded: x^ [..., num_kv_heads, D] float32."""
        if self.layout.bits == 16:
            return rows.contiguous().view(torch.float16).float()
        stored = parameters.contiguous().view(self.layout.parameter_dtype).squeeze(-1)
        scales, zeros = stored.float().chunk(2, dim=-1)
        return self.dequantize(unpack(rows, self.layout), scales, zeros)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: [..., num_kv_heads, D] float32 -> codes uint8 of its shape, scales and zeros [..., num_kv_heads,
        num_groups] of the parameters' dtype."""
        dtype, max_code = self.layout.parameter_dtype, self.layout.max_code
        prescale = self.prescale[:, None]  # [num_kv_heads, 1]
        grouped = split_last(x.clamp(-LIMIT, LIMIT), self.layout.num_groups, self.layout.group_size)
        low, high = self._clipped(grouped.amin(-1), grouped.amax(-1))
        scales = encode_parameter((high - low) / max_code / prescale, dtype)
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the smallest subnormal
        read_scales = scales.float().clamp_min(smallest)  # a NaN stays
        read_zeros = encode_parameter(low / prescale, dtype).float()
        steps = (grouped / prescale[..., None] - read_zeros[..., None]) / read_scales[..., None]
        codes = steps.clamp(0, max_code).round().nan_to_num(0).to(torch.uint8)
        return codes.flatten(-2), encode_parameter(read_scales, dtype), encode_parameter(read_zeros, dtype)

    def dequantize(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """codes: [..., num_kv_heads, D] uint8, scales and zeros as read [..., num_kv_heads, num_groups] float32."""
        grouped = split_last(codes, self.layout.num_groups, self.layout.group_size).float()
        values = grouped * scales[..., None] + zeros[..., None]
        return values.mul_(self.prescale[:, None, None]).flatten(-2)

    def _clipped(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """low, high: [..., num_kv_heads, num_groups]."""
        if self.mode == "origin":
            return self.clip * low, self.clip * high
        middle = (low + high) * 0.5
        half = (high - low) * 0.5 * self.clip
        return middle - half, middle + half


def encode_parameter(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 -> `dtype`, saturating. A zero has no sign and a NaN one code, so that equal pages have equal bytes."""
    limit = torch.finfo(dtype).max
    rounded = values.clamp(-limit, limit).to(dtype)
    bits, nan = (torch.uint8, 0x7F) if dtype == torch.float8_e4m3fn else (torch.int16, 0x7E00)
    codes = rounded.view(bits).masked_fill(rounded.float() == 0, 0).masked_fill(values.isnan(), nan)
    return codes.view(dtype)


def default_clip(bits: float, group_size: int) -> float:
    """The alpha of the mid clip that gives normally distributed groups, which a Hadamard rotation comes near, the least
    squared error with e4m3 parameters: by search in steps of 0.02 over 40,000 groups of 32, 64 and 128.

    At 64 channels it takes 2 bits from 0.203 to 0.116 of the variance, 1.5 bits from 0.443 to 0.192.
    """
    at_64, step = {4.0: (0.96, 0.02), 3.0: (0.86, 0.06), 2.0: (0.66, 0.06), 1.5: (0.54, 0.06)}.get(bits, (1.0, 0.0))
    alpha = at_64 - step * math.log2(group_size / 64)
    return float(torch.tensor(min(1.0, alpha)).half())  # the precision of calibrated ones


def prescale_for(root_mean_square: float) -> float:
    """The power of two next above a head's root mean square: a 4-bit step (a third of it) and the smallest zeros are
    then far above 2^-6, where e4m3 gets coarse, and values up to 448 times the mean still fit."""
    if not root_mean_square > 0 or math.isinf(root_mean_square):
        raise ValueError(f"a prescale needs a positive root mean square, found {root_mean_square}")
    return 2.0 ** math.ceil(math.log2(root_mean_square))
