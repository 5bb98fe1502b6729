"""Transforms of activations (kernels/linear/transforms.py, rounding.py), each in a kernel where torch takes dozens."""

import math
from dataclasses import fields
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from kernels.gpu import refusal
from kernels.linear.rounding import Rounding
from kernels.linear.transforms import BlockRotation, Diagonal, Hadamard, Transform

GRIDS = {"int": 0, "e4m3": 1, "e2m1": 2}  # as kernels/gpu/inputs.py numbers them
SCALES = {"float": 0, "e4m3": 1, "e8m0": 2, "e8m0-up": 3, "e8m0-third": 4, "e8m0-deviation": 5}
GIVEN = 6
CHANNELS, MOST_CHANNELS = 2048, 8192  # that a program rounds at a time; of one long group
LONGEST_HADAMARD = 16384  # channels of a block, in registers
ROTATED = MappingProxyType({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 32})


class RoundingTriton(Rounding):
    """The same codes and scales as Rounding, to the bit, for bfloat16 activations that are finite."""

    def apply(self, x: Tensor) -> Tensor:
        """x: [num_tokens, width] bfloat16 or float32 -> x^, x's dtype."""
        out = torch.empty_like(x.contiguous())
        round_groups(x.contiguous(), self, out)
        return out


class HadamardTriton(Hadamard):
    """The same additions in the same order as Hadamard. 4 bytes and log2(block) operations a channel."""

    def apply(self, x: Tensor) -> Tensor:
        """x: [num_tokens, width] bfloat16 or float32 -> the same shape and dtype."""
        from kernels.gpu import quantize

        if x.shape[-1] % self.block:
            raise ValueError(f"{x.shape[-1]} channels are not whole Hadamard blocks of {self.block}")
        out, kernel = torch.empty_like(x.contiguous()), quantize.hadamard
        if x.numel():
            kernel[(x.numel() // self.block,)](
                x.contiguous(),
                out,
                1 / math.sqrt(self.block),
                **hadamard_constants(self.block),
                num_warps=hadamard_warps(self.block),
                enable_fp_fusion=False,
            )
        return out


class BlockRotationTriton(BlockRotation):
    """The same products as BlockRotation, summed in another order. Matrices are float32."""

    def apply(self, x: Tensor) -> Tensor:
        """x: [num_tokens, width] bfloat16 or float32 -> the same shape and dtype."""
        from kernels.gpu import inputs

        num_matrices, size, _ = self.matrices.shape
        num_tokens, width = x.shape
        if width % size or num_matrices not in (1, width // size):
            raise ValueError(f"{width} channels are not the runs of a rotation {tuple(self.matrices.shape)}")
        out, kernel = torch.empty_like(x.contiguous()), inputs.rotate_blocks
        sizes = (num_tokens, width, size, int(num_matrices == 1))
        grid = (-(-size // ROTATED["BLOCK_N"]), width // size, -(-num_tokens // ROTATED["BLOCK_M"]))
        if x.numel():
            kernel[grid](x.contiguous(), self.matrices, out, *sizes, **ROTATED, num_warps=4)
        return out


def on_gpu(transform: Transform, device: torch.device, dtype: torch.dtype) -> Transform:
    """The transform that does the same in Triton, or itself where there is none."""
    if refusal(device, dtype) is not None:
        return transform
    if isinstance(transform, Rounding) and has_kernel(transform):
        values = {field.name: getattr(transform, field.name) for field in fields(transform)}
        return RoundingTriton(**values)
    if isinstance(transform, Hadamard) and transform.block <= LONGEST_HADAMARD:
        return HadamardTriton(transform.block)
    if isinstance(transform, BlockRotation):
        return BlockRotationTriton(transform.matrices.float().contiguous())
    if isinstance(transform, Diagonal):
        return Diagonal(transform.scale.float())  # as it is multiplied: one kernel less
    return transform


def hadamard_constants(block: int) -> dict[str, Any]:
    """What the kernel is compiled for."""
    return {"D": block, "LEVELS": block.bit_length() - 1, "LIMIT": math.inf}


def hadamard_warps(block: int) -> int:
    return max(1, min(16, block // 512))


def has_kernel(rounding: Rounding) -> bool:
    """Deviations are summed in one order, which only groups of a power of two share with the kernel."""
    channels = rounding.channels or 0
    is_short = 0 < channels <= CHANNELS and not channels & (channels - 1)
    return rounding.scale_grid != "e8m0-deviation" or is_short


def constants(rounding: Rounding, channels: int) -> dict[str, Any]:
    """What the kernel is compiled for."""
    low, high = rounding.bounds
    block = min(1 << (channels - 1).bit_length(), MOST_CHANNELS)
    return {
        "GRID": GRIDS[rounding.grid],
        "SCALE": SCALES[rounding.scale_grid] if rounding.scale is None else GIVEN,
        "SYMMETRIC": int(rounding.symmetric),
        "ZERO": int(rounding.zero is not None),
        "LOW": low,
        "HIGH": high,
        "LARGEST": int(high).bit_length() - 1,
        "C": block,
        "LEVELS": block.bit_length() - 1,
        "GROUPS": max(1, CHANNELS // block),
    }


def num_warps(block: int) -> int:
    return 4 if block <= CHANNELS else 8


def round_groups(x: Tensor, rounding: Rounding, out: Tensor) -> None:
    """x: [num_tokens, width]; mutates out, likewise. Both contiguous."""
    from kernels.gpu import inputs

    num_tokens, width = x.shape
    channels = rounding.channels or width
    if rounding.scale is not None:
        channels = min(width, CHANNELS)
    num_groups = -(-width // channels)
    fixed = constants(rounding, channels)
    given = [rounding.scale, rounding.zero, rounding.scale_unit]
    one = next((tensor for tensor in given if tensor is not None), x)  # stands for what is not read
    kernel: Any = inputs.round_groups
    kernel[num_tokens, -(-num_groups // fixed["GROUPS"])](
        x,
        *(one if tensor is None else tensor for tensor in given),
        out,
        width,
        channels,
        num_groups,
        **fixed,
        num_warps=num_warps(fixed["C"]),
        enable_fp_fusion=False,
    )
