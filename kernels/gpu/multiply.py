"""Activations times packed matrices: which kernel runs, on which grid."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.contract import LinearSpec
from kernels.gpu.configs import Config, Grid, grid_for
from kernels.gpu.joining import ends_of, join_matrices
from kernels.gpu.packing import Packed, packed_refusal
from kernels.linear.blocks import check_width

SUM_BLOCK = 1024  # elements that one program of sum_splits adds up
SHARED_BYTES = 96 << 10  # of the 99 KiB that a program gets with compute capability 8.6 and 8.9


class TritonKernel:
    """What the families share once their codes are packed.

    "triton-fixed" has one configuration for any number of rows: a row's result is the same to the last bit whatever
    shares its step. "triton" has several, by default one each for up to 8, up to 16, up to 64 and more rows, and holds
    that within each.
    """

    def __init__(self, fixed: bool = False) -> None:
        self._fixed = fixed
        self.name = "triton-fixed" if fixed else "triton"

    def refuses(self, spec: LinearSpec) -> str | None:
        return packed_refusal(spec)

    def join(self, prepared: Sequence[Packed]) -> tuple[Packed, ...]:
        """One matrix, a copy, where they are alike; else they run one after the other."""
        joined = join_matrices(prepared)
        return tuple(prepared) if joined is None else (joined,)

    def linear(self, x: Tensor, joined: tuple[Packed, ...]) -> tuple[Tensor, ...]:
        """x: [num_tokens, K] bfloat16 -> [num_tokens, N] bfloat16 for each matrix. Raises ValueError for another K."""
        for packed in joined:
            check_width(x, packed.in_features)
        if x.dtype != torch.bfloat16:
            raise ValueError(f"activations must be bfloat16, found {x.dtype}")
        x = x.contiguous()
        outs: list[Tensor] = []
        for packed in joined:
            y = x.new_empty(x.shape[0] * packed.out_features)
            multiply(x, packed, y, self._fixed)
            parts = torch.split(y, [x.shape[0] * rows for rows in packed.rows])
            outs += [part.view(x.shape[0], rows) for part, rows in zip(parts, packed.rows, strict=True)]
        return tuple(outs)


def shift_of(packed: Packed) -> int:
    """What is added to values: 0 nothing, 1 one number, 2 whole zero points, 3 other zero points, 4 offsets."""
    if not packed.has_shift:
        return 0
    if packed.zeros is not None:
        return 2 if packed.zeros.dtype == torch.uint8 else 3
    return 1 if packed.offsets is None else 4


def constants(packed: Packed, config: Config) -> dict[str, int]:
    """What a kernel is compiled for."""
    return {
        "GROUP": packed.group_size,
        "BITS": packed.bits,
        "PLANES": packed.planes,
        "PLANE": packed.plane,
        "RUN": packed.run,
        "BASE": packed.base,
        "CENTER": packed.center,
        "MEANING": packed.meaning,
        "MIXED": int(packed.mixed_table),
        "SHIFT": shift_of(packed),
        "STEP": 0 if packed.steps is None else packed.steps.ratio,
        "EACH": packed.groups_of_plane,
        "PARTS": 1 if packed.scales.dtype == torch.bfloat16 else 2,  # bfloat16 that a scale is the sum of
        "EVEN": int(packed.in_features % (packed.planes * packed.plane) == 0),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }


def num_stages(packed: Packed, config: Config) -> int:
    """Loads under way ahead of the products: no more than the smallest GPU has shared memory for.

    The compiler keeps the tiles of all planes for each stage but the last.
    """
    stage = packed.plane * (2 * packed.planes * config.block_m + 2 * config.block_n)  # bytes
    return min(config.num_stages, 1 + SHARED_BYTES // stage)


def multiply(x: Tensor, packed: Packed, y: Tensor, fixed: bool = False) -> None:
    """x: [num_tokens, K] bfloat16; mutates y: [num_tokens, N] floating, rounded to once, of joined matrices one after
    the other. Both contiguous."""
    if x.shape[0] and packed.out_features:
        launch(x, packed, y, grid_for(x.shape[0], packed.out_features, packed.num_blocks, fixed, packed.configs))


def launch(x: Tensor, packed: Packed, y: Tensor, grid: Grid) -> Any:
    """The same with one grid. Returns the compiled kernel."""
    from kernels.gpu import linear

    num_tokens, n = x.shape[0], packed.out_features
    is_split = grid.num_splits > 1
    out = x.new_empty(grid.num_splits, num_tokens, n, dtype=torch.float32) if is_split else y
    kernel: Any = getattr(linear, grid.config.kernel)
    compiled = kernel[grid.tiles_n, grid.tiles_m, grid.num_splits](
        x,
        packed.words,
        *parameters(packed),
        out,
        num_tokens,
        packed.in_features,
        n,
        packed.num_blocks,
        packed.num_groups,
        grid.blocks_per_split,
        *ends_of(packed),
        packed.factor,
        **constants(packed, grid.config),
        num_warps=grid.config.num_warps,
        num_stages=num_stages(packed, grid.config),
        enable_fp_fusion=True,
    )
    if is_split:
        count = y.numel()
        linear.sum_splits[(-(-count // SUM_BLOCK),)](out, y, grid.num_splits, count, BLOCK=SUM_BLOCK)
    return compiled


def parameters(packed: Packed) -> tuple[Tensor, ...]:
    """scales, zeros, offsets, scale_steps, offset_steps, table; scales stand for what the kernel does not read."""
    steps = (None, None) if packed.steps is None else (packed.steps.scales, packed.steps.offsets)
    given = (packed.scales, packed.zeros, packed.offsets, *steps, packed.table)
    return tuple(packed.scales if tensor is None else tensor for tensor in given)
