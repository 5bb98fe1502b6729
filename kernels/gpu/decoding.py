"""Activations times weights that are decoded first (kernels/gpu/decoded.py): how they lie, which grid runs.

The channels of a row go in blocks of P planes of V channels; no plane crosses the border of a group.

    E4M3, TABLES   int32 [N, num_blocks * V / 2]: half i of a block holds code j V + i in its bits [j b, (j + 1) b),
                   j < P = 16 // b, b 8 for e4m3
    BOOK           codes as they are, [N, num_blocks * V / d], P = 1
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.contract import LinearSpec
from kernels.gpu import refusal
from kernels.gpu.multiply import SUM_BLOCK
from kernels.gpu.packing import CODES_AT_ONCE
from kernels.gpu.tiles import ANY, Tile, cut
from kernels.linear.blocks import check_width

E4M3, BOOK, TABLES = 0, 1, 2
LONGEST = (64, 128, 32)  # V, by what is decoded; 64 codes that are looked up one by one make a thread spill
SHORTEST = 16  # V: a product takes no less
TILES = (Tile(8, 8, 64, 2, 3), Tile(16, 16, 64, 2, 3), Tile(64, 64, 64, 4, 3), Tile(ANY, 128, 128, 8, 2))
TABLE_TILES = (*TILES[:2], Tile(64, 64, 64, 4, 1), Tile(ANY, 64, 64, 4, 1))  # two stages make sm_100 spill
FIXED = (Tile(ANY, 16, 64, 2, 3),)


@dataclass(frozen=True)
class Decoded:
    """One matrix [N, K]:  w[n, k] = s[g, n // R] * decode(code[n, k]),   g = k // G."""

    kind: int
    bits: int  # of a code as it is stored
    in_features: int  # K
    group_size: int  # G, at most K: channels that share a scale, or a table
    plane: int  # V
    codes: Tensor
    book: Tensor  # [num_vectors, d] bfloat16, or [N, groups, entries] floating; what is not read, of e4m3
    scales: Tensor  # [groups, ceil(N / R)] float32, float16 or bfloat16; [1, 1] where there are none
    rows_per_scale: int  # R

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def planes(self) -> int:
        return 1 if self.kind == BOOK else 16 // self.bits

    @property
    def num_blocks(self) -> int:
        return -(-self.in_features // (self.planes * self.plane))

    @property
    def num_groups(self) -> int:
        return -(-self.in_features // self.group_size)

    @property
    def run(self) -> int:
        """Planes that surely share a scale, or a table."""
        if self.num_groups == 1:
            return self.planes
        return math.gcd(self.planes, self.group_size // self.plane)

    @property
    def num_bytes(self) -> int:
        """Bytes that a step reads of the matrix."""
        tensors = (self.codes, self.scales) if self.kind == E4M3 else (self.codes, self.book, self.scales)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def decoded_refusal(spec: LinearSpec) -> str | None:
    """Why a layer has no Triton kernel, or None."""
    if (reason := refusal(spec.device, spec.dtype)) is not None:
        return reason
    if spec.group_size % SHORTEST and spec.group_size < spec.in_features:
        return f"groups of {spec.group_size} channels are neither a multiple of {SHORTEST} nor the whole row"
    return None


def plane_of(kind: int, in_features: int, group_size: int) -> int:
    """V. Raises ValueError for groups that no plane divides."""
    plane = LONGEST[kind] if group_size >= in_features else math.gcd(group_size, LONGEST[kind])
    if plane < SHORTEST:
        raise ValueError(f"groups of {group_size} channels have no packed form: they must be a multiple of {SHORTEST}")
    return plane


def pack_halves(codes: Tensor, bits: int, plane: int) -> Tensor:
    """[N, K] uint8, each below 2^bits -> [N, num_blocks * V / 2] int32. Takes 10 bytes of scratch memory for each of
    CODES_AT_ONCE codes, or of one row."""
    planes = 16 // bits
    num_rows, num_blocks = len(codes), -(-codes.shape[1] // (planes * plane))
    halves = torch.empty(num_rows, num_blocks * plane, dtype=torch.int16, device=codes.device)
    rows_at_once = max(1, CODES_AT_ONCE // max(1, codes.shape[1]))
    for start in range(0, num_rows, rows_at_once):
        rows = codes[start : start + rows_at_once]
        padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % (planes * plane)))
        blocks = padded.view(len(rows), num_blocks, planes, plane)
        words = torch.zeros(len(rows), num_blocks, plane, dtype=torch.int32, device=codes.device)
        for j in range(planes):
            words |= blocks[:, :, j].int() << (j * bits)
        halves[start : start + rows_at_once] = ((words & 0x7FFF) - (words & 0x8000)).flatten(1)  # as int16
    return halves.view(torch.int32)


class DecodingKernel:
    """What the families share once their codes lie as they must.

    "triton-fixed" has one configuration for any number of rows, "triton" one each for up to 8, 16, 64 and more, within
    which a row's result is the same to the last bit whatever shares its step.
    """

    def __init__(self, fixed: bool = False) -> None:
        self._fixed = fixed
        self.name = "triton-fixed" if fixed else "triton"

    def refuses(self, spec: LinearSpec) -> str | None:
        return decoded_refusal(spec)

    def join(self, prepared: Sequence[Decoded]) -> tuple[Decoded, ...]:
        """Matrices run one after the other."""
        return tuple(prepared)

    def linear(self, x: Tensor, joined: tuple[Decoded, ...]) -> tuple[Tensor, ...]:
        """x: [num_tokens, K] bfloat16 -> [num_tokens, N] bfloat16 for each matrix. Raises ValueError for another K."""
        for matrix in joined:
            check_width(x, matrix.in_features)
        if x.dtype != torch.bfloat16:
            raise ValueError(f"activations must be bfloat16, found {x.dtype}")
        x = x.contiguous()
        outs = tuple(x.new_empty(x.shape[0], matrix.out_features) for matrix in joined)
        for matrix, out in zip(joined, outs, strict=True):
            multiply(x, matrix, out, self._fixed)
        return outs


def tiles_of(matrix: Decoded, fixed: bool) -> tuple[Tile, ...]:
    if fixed:
        return FIXED
    return TABLE_TILES if matrix.kind == TABLES else TILES


def constants(matrix: Decoded, tile: Tile) -> dict[str, int]:
    """What the kernel is compiled for."""
    vector = matrix.book.shape[1] if matrix.kind == BOOK else 1
    return {
        "KIND": matrix.kind,
        "BITS": matrix.bits,
        "ENTRIES": matrix.book.shape[2] if matrix.kind == TABLES else 0,
        "D": vector,
        "PLANES": matrix.planes,
        "V": matrix.plane,
        "WIDTH": matrix.plane // (vector if matrix.kind == BOOK else 2),
        "RUN": matrix.run,
        "GROUP": matrix.group_size,
        "WHOLE": int(len(matrix.scales) == 1),
        "EVEN": int(matrix.in_features % (matrix.planes * matrix.plane) == 0),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
    }


def multiply(x: Tensor, matrix: Decoded, y: Tensor, fixed: bool = False) -> None:
    """x: [num_tokens, K] bfloat16; mutates y: [num_tokens, N] floating, rounded to once. Both contiguous."""
    from kernels.gpu import decoded, linear

    num_tokens, n = y.shape
    if not num_tokens or not n:
        return
    plan = cut(tiles_of(matrix, fixed), num_tokens, n, matrix.num_blocks)
    is_split = plan.num_splits > 1
    out = x.new_empty(plan.num_splits, num_tokens, n, dtype=torch.float32) if is_split else y
    kernel: Any = decoded.multiply
    kernel[plan.tiles_n, plan.tiles_m, plan.num_splits](
        x,
        matrix.codes,
        matrix.book,
        matrix.scales,
        out,
        num_tokens,
        matrix.in_features,
        n,
        matrix.num_blocks,
        matrix.num_groups,
        plan.blocks_per_split,
        matrix.rows_per_scale,
        matrix.scales.shape[1],
        **constants(matrix, plan.tile),
        num_warps=plan.tile.num_warps,
        num_stages=plan.tile.num_stages,
    )
    if is_split:
        total: Any = linear.sum_splits
        total[(-(-y.numel() // SUM_BLOCK),)](out, y, plan.num_splits, y.numel(), BLOCK=SUM_BLOCK)
