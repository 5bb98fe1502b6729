"""The int8 family on NVIDIA GPUs, in Triton (kernels/gpu/int8.py)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.contract import LinearSpec
from kernels.gpu import refusal
from kernels.gpu.multiply import SUM_BLOCK, TritonKernel
from kernels.gpu.packing import Packed, pack
from kernels.gpu.tiles import ANY, Tile, cut
from kernels.gpu.transforms import on_gpu
from kernels.linear.bitstream import pack_codes
from kernels.linear.blocks import check_width
from kernels.linear.int8.layout import Int8Weights
from kernels.linear.int8.native import fixed_zero, has_zero
from kernels.linear.rounding import Rounding
from kernels.linear.transforms import Transform, same

SHORTEST_RUN, LONGEST_RUN = 32, 128  # channels that are multiplied at a time; tensor cores take no less than 32
MAX_EXACT = 1 << 15  # channels whose products a sum of 32 bits holds: 2^15 products of at most 2^7 and 2^8
ROUND_BLOCK = 8192  # channels that a program rounds at a time
ROUND_WARPS = 8
FEW = (Tile(8, 8, 64, 2, 4), Tile(16, 16, 64, 2, 4))
WHOLE_ROWS = (*FEW, Tile(64, 64, 64, 4, 3), Tile(ANY, 128, 128, 8, 3))
GROUPS = (*FEW, Tile(64, 64, 64, 4, 3), Tile(ANY, 64, 64, 4, 3))
GROUPS_WITH_ZEROS = (*FEW, Tile(64, 32, 64, 4, 3), Tile(ANY, 32, 64, 4, 3))  # 64 tokens make sm_100 spill
FIXED = (Tile(ANY, 16, 64, 2, 4),)


@dataclass(frozen=True)
class Tokens:
    """How activations are rounded, and how they lie then."""

    rounding: Rounding
    fixed_scale: Tensor  # [1] float32, of a rounding that has one
    fixed_zero: Tensor  # likewise
    width: int  # K
    padded: int  # K rounded up to whole blocks
    run: int  # V: channels whose codes are counted together


@dataclass(frozen=True)
class Prepared:
    """One matrix, as kernels.gpu.int8.multiply reads it."""

    tokens: Tokens
    bits: int  # of a stored code: 4 or 8
    group_size: int  # G
    weights: Tensor  # [N, padded * bits / 8] int8; of 4 bits, byte i of a block holds channels i (low) and V + i
    scales: Tensor  # [groups, N] float32, float16 or bfloat16
    zeros: Tensor | None  # [groups, N] int8
    sums: Tensor | None  # [N] float32, of all weights of a row, where activations have a zero point

    @property
    def num_bytes(self) -> int:
        tensors = (self.weights, self.scales, self.zeros, self.sums)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


@dataclass(frozen=True)
class ByChannels:
    """One matrix whose activations have a scale for each group of channels: they are multiplied as bfloat16."""

    packed: Packed
    rounding: Transform

    @property
    def num_bytes(self) -> int:
        return self.packed.num_bytes


class Int8Triton:
    """y[t, n] = x_scale[t] sum_j s[n, j] sum_{k in j} (q[n, k] - z[n, j]) (a[t, k] - x_zero[t])
    a = round(x / x_scale + x_zero)

    The inner sums are exact integers on tensor cores, j the groups, or 32,768 channels of a row that has one scale; the
    outer one is in float32. Activations are rounded once for all matrices that read them. Those with a scale for each
    group of channels are rounded to bfloat16 once more, and multiplied as such.

    Reads 4 or 8 bits of each weight once for up to 64 rows, 32 with groups that have zero points; 2 T N K operations.
    """

    def __init__(self, fixed: bool = False) -> None:
        self._fixed = fixed
        self.name = "triton-fixed" if fixed else "triton"
        self._floats = TritonKernel(fixed)

    def refuses(self, spec: LinearSpec) -> str | None:
        if (reason := refusal(spec.device, spec.dtype)) is not None:
            return reason
        if spec.group_size % SHORTEST_RUN and spec.group_size < spec.in_features:
            return f"groups of {spec.group_size} channels are neither a multiple of {SHORTEST_RUN} nor the whole row"
        if MAX_EXACT < spec.group_size < spec.in_features:
            return f"groups of {spec.group_size} channels are longer than the {MAX_EXACT} whose sums are exact"
        return None

    def prepare(self, weights: Int8Weights) -> Prepared | ByChannels:
        """Codes of 2 and 3 bits take 4, of 5 to 7 bits take 8.

        Raises ValueError for a zero point of activations that is no integer, and for groups without a packed form.
        """
        rounding, width = weights.rounding, weights.in_features
        if (rounding.channels or width) < width or rounding.scale_grid != "float":
            fast = on_gpu(rounding, weights.weight.device, torch.bfloat16)
            return ByChannels(pack_codes_in_groups(weights), fast)
        group = min(weights.group_size, width, MAX_EXACT)
        run = LONGEST_RUN if group == width else math.gcd(group, LONGEST_RUN)
        if run < SHORTEST_RUN:
            raise ValueError(f"groups of {group} channels are neither a multiple of {SHORTEST_RUN} nor the whole row")
        bits = 4 if weights.bits <= 4 else 8
        codes = torch.nn.functional.pad(weights.weight, (0, -width % (run * 8 // bits)))
        repeats = 1 if weights.num_groups > 1 else -(-width // group)
        scales, zeros = weights.scales.T.repeat(repeats, 1), weights.zeros
        return Prepared(
            tokens=Tokens(rounding, *fixed(rounding, codes.device), width, codes.shape[1], run),
            bits=bits,
            group_size=group,
            weights=codes.contiguous() if bits == 8 else pack_halves(codes, run),
            scales=scales.contiguous(),
            zeros=None if zeros is None or not zeros.any() else zeros.T.repeat(repeats, 1).contiguous(),
            sums=sums_of_rows(weights) if has_zero(rounding) else None,
        )

    def join(self, prepared: Sequence[Prepared | ByChannels]) -> tuple[Prepared | ByChannels, ...] | None:
        """None when the matrices read activations that are rounded differently, or that lie differently then."""
        first = prepared[0]
        alike = all(same((rounding_of(one),), (rounding_of(first),)) for one in prepared)
        return tuple(prepared) if alike and len({place_of(one) for one in prepared}) == 1 else None

    def linear(self, x: Tensor, joined: tuple[Prepared | ByChannels, ...]) -> tuple[Tensor, ...]:
        """x: [num_tokens, K] bfloat16 -> [num_tokens, N] bfloat16 for each matrix. Raises ValueError for another K."""
        by_channels = [one for one in joined if isinstance(one, ByChannels)]
        if by_channels:
            rounded = by_channels[0].rounding.apply(x)
            return self._floats.linear(rounded, tuple(one.packed for one in by_channels))
        matrices = [one for one in joined if isinstance(one, Prepared)]
        check_width(x, matrices[0].tokens.width)
        if x.dtype != torch.bfloat16:
            raise ValueError(f"activations must be bfloat16, found {x.dtype}")
        outs = tuple(x.new_empty(x.shape[0], one.weights.shape[0]) for one in matrices)
        if x.shape[0]:
            rounded_tokens = round_tokens(x.contiguous(), matrices[0].tokens)
            for one, out in zip(matrices, outs, strict=True):
                multiply(rounded_tokens, one, out, self._fixed)
        return outs


def rounding_of(one: Prepared | ByChannels) -> Transform:
    return one.tokens.rounding if isinstance(one, Prepared) else one.rounding


def place_of(one: Prepared | ByChannels) -> tuple[int, int] | None:
    """How the matrix finds rounded activations: channels with padding, and those that are counted together."""
    return (one.tokens.padded, one.tokens.run) if isinstance(one, Prepared) else None


@dataclass(frozen=True)
class Unsigned:
    """Codes as kernels.gpu.packing takes them."""

    bits: int
    in_features: int
    group_size: int
    codes: Tensor  # [N, ceil(K * bits / 8)] uint8

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]


def pack_codes_in_groups(weights: Int8Weights) -> Packed:
    """The matrix as kernels that multiply bfloat16 read it. Raises ValueError for groups that no plane divides."""
    bits = 4 if weights.bits <= 4 else 8
    middle = 1 << (bits - 1)
    codes = pack_codes((weights.weight.short() + middle).to(torch.uint8), bits)
    zeros = None if weights.zeros is None else (weights.zeros.T.short() + middle).to(torch.uint8).contiguous()
    unsigned = Unsigned(bits, weights.in_features, weights.group_size, codes)
    return pack(unsigned, weights.scales, zeros=zeros, center=middle)


def fixed(rounding: Rounding, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a rounding that has them, else of none. Raises ValueError for one that is no integer."""
    scale = torch.ones(1, device=device) if rounding.scale is None else rounding.scale.float().reshape(1)
    return scale, torch.full((1,), float(fixed_zero(rounding)), device=device)


def pack_halves(codes: Tensor, run: int) -> Tensor:
    """codes: [N, padded] int8 of at most 4 bits -> [N, padded / 2] int8."""
    blocks = codes.view(len(codes), -1, 2, run)  # [N, blocks, 2, V]
    return ((blocks[:, :, 0] & 15) | (blocks[:, :, 1] << 4)).flatten(1).contiguous()


def sums_of_rows(weights: Int8Weights, num_rows: int = 1024) -> Tensor:
    """What a zero point of 1 takes off: the sum of each row's weights, [N] float32. num_rows at a time."""
    starts = range(0, weights.out_features, num_rows)
    return torch.cat(
        [weights.dequantize_rows(i, min(i + num_rows, weights.out_features)).double().sum(1) for i in starts]
    ).float()


def rounding_constants(tokens: Tokens) -> dict[str, Any]:
    """What round_tokens is compiled for."""
    low, high = tokens.rounding.bounds
    return {
        "LOW": low,
        "HIGH": high,
        "SYMMETRIC": int(tokens.rounding.symmetric),
        "STATIC": int(tokens.rounding.scale is not None),
        "V": tokens.run,
        "BLOCK": min(1 << (tokens.padded - 1).bit_length(), ROUND_BLOCK),
    }


def round_tokens(x: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x: [num_tokens, K] -> codes [num_tokens, padded] int8, scales [num_tokens] float32, zeros [num_tokens] int32,
    counts [num_tokens, padded / V] int32."""
    from kernels.gpu import int8

    num_tokens, kernel, constants = x.shape[0], int8.round_tokens, rounding_constants(tokens)
    codes = x.new_empty(num_tokens, tokens.padded, dtype=torch.int8)
    scales, zeros = x.new_empty(num_tokens, dtype=torch.float32), x.new_empty(num_tokens, dtype=torch.int32)
    counts = x.new_empty(num_tokens, tokens.padded // tokens.run, dtype=torch.int32)
    kernel[(num_tokens,)](
        x, tokens.fixed_scale, tokens.fixed_zero, codes, scales, zeros, counts, tokens.width, tokens.padded,
        **constants, num_warps=ROUND_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return codes, scales, zeros, counts


def tiles_of(matrix: Prepared, is_fixed: bool) -> tuple[Tile, ...]:
    if is_fixed:
        return FIXED
    if len(matrix.scales) == 1:
        return WHOLE_ROWS
    return GROUPS if matrix.zeros is None else GROUPS_WITH_ZEROS


def constants(matrix: Prepared, tile: Tile) -> dict[str, int]:
    """What multiply is compiled for."""
    return {
        "GROUP": matrix.group_size,
        "V": matrix.tokens.run,
        "PLANES": 8 // matrix.bits,
        "WHOLE": int(len(matrix.scales) == 1),
        "ZEROS": int(matrix.zeros is not None),
        "TOKEN_ZEROS": int(matrix.sums is not None),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
    }


def multiply(tokens: tuple[Tensor, Tensor, Tensor, Tensor], matrix: Prepared, y: Tensor, is_fixed: bool) -> None:
    """tokens: what round_tokens gives; mutates y: [num_tokens, N] floating, rounded to once."""
    from kernels.gpu import int8, linear

    num_tokens, n = y.shape
    num_blocks = matrix.tokens.padded * matrix.bits // (8 * matrix.tokens.run)
    plan = cut(tiles_of(matrix, is_fixed), num_tokens, n, num_blocks)
    is_split = plan.num_splits > 1
    out = y.new_empty(plan.num_splits, num_tokens, n, dtype=torch.float32) if is_split else y
    kernel: Any = int8.multiply
    kernel[plan.tiles_n, plan.tiles_m, plan.num_splits](
        *tokens, matrix.weights, matrix.scales,
        matrix.scales if matrix.zeros is None else matrix.zeros, matrix.scales if matrix.sums is None else matrix.sums,
        out, num_tokens, matrix.tokens.padded, n, num_blocks, len(matrix.scales), plan.blocks_per_split,
        **constants(matrix, plan.tile), num_warps=plan.tile.num_warps, num_stages=plan.tile.num_stages,
    )  # fmt: skip
    if is_split:
        total: Any = linear.sum_splits
        total[(-(-y.numel() // SUM_BLOCK),)](out, y, plan.num_splits, y.numel(), BLOCK=SUM_BLOCK)
