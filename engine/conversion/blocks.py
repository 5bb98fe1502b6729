"""Formats of small blocks with a scale of one byte: MXINT8, MXFP4, NVINT4, NVFP4 (as arXiv:2510.25602 defines them).

    MX   blocks of 32   s = 2^ceil(log2(max |w| / m)), one e8m0 byte
    NV   blocks of 16   s = e4m3(max |w| / m / f) f,  f = max over the matrix of (max |w| / m) / 448, one float32

    MXINT8 m = 127   MXFP4, NVFP4 m = 6   NVINT4 m = 7
    INT    w' = s round(w / s), ties to even, within +-m
    FP4    w' = s times the nearest E2M1 value, ties to the even code

The ceiling means that no weight of an MX block is clipped; OCP's own rule, floor(log2 max |w|) - 2, clips some.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from engine.conversion.encoder import by_rows, from_groups, to_groups
from kernels.linear.affine.layout import AffineWeights
from kernels.linear.bitstream import pack_codes
from kernels.linear.table.layout import TableWeights
from kernels.linear.table.tables import E2M1
from kernels.linear.weights import LinearWeights

MX_BLOCK, NV_BLOCK = 32, 16
LARGEST_E4M3 = 448.0
MIN_EXPONENT, MAX_EXPONENT = -127, 127  # of e8m0
INT4 = tuple(float(value) for value in range(-7, 8))
E2M1_MIDPOINTS = tuple((E2M1[i] + E2M1[i + 1]) / 2 for i in range(7))


@dataclass(frozen=True)
class MxInt8:
    """8-bit integers, 8.25 bits a weight."""

    def encode(self, weight: Tensor) -> LinearWeights:
        codes, scales = by_rows(weight, self._rows)
        zeros = torch.tensor([[128]], dtype=torch.uint8).expand(scales.shape)
        return LinearWeights((AffineWeights(8, weight.shape[1], MX_BLOCK, codes, scales, zeros),))

    def _rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        groups = to_groups(rows, MX_BLOCK)
        scale = power_of_two_scale(groups, 127)
        q = (groups / scale.unsqueeze(-1)).round().clamp(-127, 127) + 128
        # bfloat16 has every power of two that e8m0 has; the container stores one byte.
        return from_groups(q, rows.shape[1]).to(torch.uint8).contiguous(), scale.bfloat16()


@dataclass(frozen=True)
class MxFp4:
    """E2M1 values, 4.25 bits a weight."""

    def encode(self, weight: Tensor) -> LinearWeights:
        codes, scales = by_rows(weight, self._rows)
        return LinearWeights(
            (TableWeights(4, weight.shape[1], MX_BLOCK, codes, scales.to(torch.float8_e8m0fnu), E2M1),)
        )

    def _rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        groups = to_groups(rows, MX_BLOCK)
        scale = power_of_two_scale(groups, 6)
        codes = nearest_e2m1(groups / scale.unsqueeze(-1))
        return pack_codes(from_groups(codes, rows.shape[1]), 4), scale


@dataclass(frozen=True)
class Nv4:
    """E2M1 values (NVFP4) or integers (NVINT4), 4.5 bits a weight."""

    kind: Literal["fp", "int"]

    def encode(self, weight: Tensor) -> LinearWeights:
        largest = 6 if self.kind == "fp" else 7
        factor = float(weight.abs().max().float() / largest / LARGEST_E4M3) or 1.0

        def rows_of(rows: Tensor) -> tuple[Tensor, Tensor]:
            groups = to_groups(rows, NV_BLOCK)
            scales = (groups.abs().amax(-1) / largest / factor).to(torch.float8_e4m3fn)  # [rows, groups]
            scale = scales.float() * factor
            x = groups / torch.where(scale > 0, scale, torch.inf).unsqueeze(-1)  # a scale rounded to 0 makes zeros
            codes = nearest_e2m1(x) if self.kind == "fp" else (x.round().clamp(-7, 7) + 7).to(torch.uint8)
            return pack_codes(from_groups(codes, rows.shape[1]), 4), scales.view(torch.uint8)

        codes, scales = by_rows(weight, rows_of)
        table = E2M1 if self.kind == "fp" else INT4
        stored = scales.view(torch.float8_e4m3fn)
        return LinearWeights((TableWeights(4, weight.shape[1], NV_BLOCK, codes, stored, table, factor),))


def power_of_two_scale(groups: Tensor, largest: float) -> Tensor:
    """2^ceil(log2(max |w| / largest)) of each group, [rows, groups] float32; 1 for a group of zeros."""
    mantissa, exponent = torch.frexp(groups.abs().amax(-1).double() / largest)  # m 2^e, 1/2 <= m < 1
    ceiling = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(MIN_EXPONENT, MAX_EXPONENT)
    return torch.where(mantissa == 0, 1.0, torch.ldexp(torch.ones_like(mantissa), ceiling)).float()


def nearest_e2m1(x: Tensor) -> Tensor:
    """The code of the E2M1 value nearest to x, uint8; ties go to the even code, what is beyond 6 to 6."""
    midpoints = torch.tensor(E2M1_MIDPOINTS)
    lower, upper = torch.bucketize(x.abs(), midpoints), torch.bucketize(x.abs(), midpoints, right=True)
    magnitude = torch.where(lower % 2 == 0, lower, upper)
    return (magnitude + 8 * ((x < 0) & (magnitude > 0))).to(torch.uint8)
