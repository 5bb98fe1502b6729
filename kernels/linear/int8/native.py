"""The int8 family in C++: activations rounded as the format says, exact integer products (kernels/native/int8.hpp).

Where activations have a scale for each group of channels, products are in float32 (kernels/native/exact.hpp).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import native
from kernels.contract import LinearSpec
from kernels.linear.bitstream import pack_codes
from kernels.linear.int8.layout import Int8Weights
from kernels.linear.joined import FloatKernel, Joined, multiply, packed_refusal
from kernels.linear.rounding import Rounding
from kernels.linear.transforms import same

if native.MISSING is None or TYPE_CHECKING:
    from kernels.native import _native


@dataclass(frozen=True)
class Prepared:
    """One matrix and the rounding of its activations."""

    packed: "_native.Packed"
    group_size: int  # at most in_features
    zero: int | None  # of all codes; None where groups have their own
    rounding: Rounding
    code_sums: Tensor | None  # [N, blocks] int32, where activations have a zero point

    @property
    def num_bytes(self) -> int:
        sums = self.code_sums
        return self.packed.num_bytes + (0 if sums is None else sums.numel() * sums.element_size())

    @property
    def by_token(self) -> bool:
        """Whether all channels of a token share a scale, which is no power of two but what follows from the values."""
        channels = self.rounding.channels or self.packed.num_channels
        return channels >= self.packed.num_channels and self.rounding.scale_grid == "float"


@dataclass(frozen=True)
class RoundedJoined:
    """Matrices that read activations rounded alike, in groups of channels."""

    joined: Joined
    rounding: Rounding


class Int8Native:
    """y[t, n] = x_scale[t] sum_j s[n, j] sum_{k in j} (q[n, k] - z[n, j]) (a[t, k] - x_zero[t])
    a = round(x / x_scale + x_zero)

    The inner sums are exact integers, j a run of channels: blocks of at most 128 inside the groups, or 32,768 channels
    of a row that has one scale. The outer one runs in order in float32: a result has the same bits for any batch, any
    number of threads and any instruction set. Activations rounded in groups of channels are multiplied in float32.

    Reads 4 or 8 bits of each weight once for up to 8 tokens; 2 T N K integer operations.
    """

    name = "native"

    def __init__(self) -> None:
        self._floats = FloatKernel()

    def refuses(self, spec: LinearSpec) -> str | None:
        return packed_refusal(spec)

    def prepare(self, weights: Int8Weights) -> Prepared:
        """Repack into blocks of 16 rows. Codes of 2 and 3 bits take 4, of 5 to 7 bits take 8.

        Raises ValueError for groups without a packed form.
        """
        bits = 4 if weights.bits <= 4 else 8
        middle = 1 << (bits - 1)
        codes = (weights.weight.short() + middle).to(torch.uint8)  # [N, K]
        zeros = None if weights.zeros is None else (weights.zeros.short() + middle).to(torch.uint8).contiguous()
        zero, rounding = middle if zeros is None else None, weights.rounding
        packed = _native.pack(
            bits,
            weights.in_features,
            weights.group_size,
            pack_codes(codes, bits).contiguous(),
            weights.scales.contiguous(),
            zeros,
            zero or 0,
        )
        sums = sums_of_blocks(codes, packed.block_channels) if has_zero(rounding) else None
        return Prepared(packed, min(weights.group_size, weights.in_features), zero, rounding, sums)

    def join(self, prepared: Sequence[Prepared]) -> Joined | RoundedJoined | None:
        """None when the matrices round their activations differently, or differ in groups or in their zero point."""
        first, packed = prepared[0], [one.packed for one in prepared]
        if not all(same((first.rounding,), (one.rounding,)) for one in prepared[1:]):
            return None
        if not first.by_token:
            return RoundedJoined(self._floats.join(packed), first.rounding)
        if len({(one.group_size, one.zero) for one in prepared}) != 1:
            return None
        rule = first.rounding
        group = _native.Int8Group(
            packed,
            rule.bits,
            rule.symmetric,
            None if rule.scale is None else float(rule.scale),
            fixed_zero(rule),
            [one.code_sums for one in prepared if one.code_sums is not None],
        )
        return Joined(group, packed[0].num_channels, tuple(one.num_rows for one in packed))

    def linear(self, x: Tensor, joined: Joined | RoundedJoined) -> tuple[Tensor, ...]:
        """x: [num_tokens, K] float32 -> [num_tokens, N] float32 for each matrix."""
        if isinstance(joined, Joined):
            return multiply(x, joined)
        return self._floats.linear(joined.rounding.apply(x), joined.joined)


def sums_of_blocks(codes: Tensor, block_channels: int) -> Tensor:
    """codes: [N, K] uint8 -> [N, blocks] int32."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % block_channels))
    return padded.view(codes.shape[0], -1, block_channels).sum(-1, dtype=torch.int32)


def has_zero(rounding: Rounding) -> bool:
    """Whether a code of 0 may not mean 0."""
    return not rounding.symmetric if rounding.scale is None else fixed_zero(rounding) != 0


def fixed_zero(rounding: Rounding) -> int:
    """The zero point beside a fixed scale, else 0. Raises ValueError for one that is no integer of 8 bits."""
    if rounding.zero is None:
        return 0
    zero = float(rounding.zero)
    if zero not in range(-128, 128):
        raise ValueError(f"the zero point of activations must be an integer of 8 bits, found {zero}")
    return int(zero)
