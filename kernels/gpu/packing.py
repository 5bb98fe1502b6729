"""How codes lie on a GPU: plane-major half-words.

The channels of a row go in blocks of P planes of V channels. Half-word i of a block holds, for each plane j, the code
of channel j V + i of the block in its bits [j b, (j + 1) b):

    half[n, B, i] = sum_j code[n, (B P + j) V + i] << (j b),      P = 16 // b

Two half-words are loaded as one int32. One shift and one mask leave the codes of plane j for two neighbouring channels,
each in the mantissa of a bfloat16, which is how tensor cores take them: half an instruction a weight for each. A plane
meets V activations that follow each other. No plane crosses the border of a group: V divides the group size.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kernels.contract import LinearSpec
from kernels.gpu import refusal
from kernels.linear.bitstream import unpack_codes

HALF_WORD = 16  # bits
PLANES = (64, 32, 16)  # channels; a product takes no less than 16
MAX_BLOCK = 320  # channels: a block of activations of 128 tokens is 80 KiB of shared memory
STORED_BITS = {1: 2, 2: 2, 3: 3, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}  # by bits of a code: widths that kernels are checked for
CODES_AT_ONCE = 1 << 24  # that are unpacked together: the head of an 8B model has 525 million
BIAS = 128  # 0x4300 | code is the bfloat16 128 + code, for codes of up to 7 bits

# What a code means: itself less `base`, the small float of MXFP4, an entry of `table`.
LINEAR, E2M1, LOOKUP = 0, 1, 2


class Coded(Protocol):
    """What families of codes in groups have in common."""

    @property
    def bits(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def group_size(self) -> int: ...
    @property
    def codes(self) -> Tensor:
        """[N, ceil(K * bits / 8)] uint8, little-endian bit stream along K."""
        ...


@dataclass(frozen=True)
class Steps:
    """What integer scales and offsets count, [num_groups / ratio, N] float16 each."""

    ratio: int  # groups that share a step
    scales: Tensor
    offsets: Tensor | None


@dataclass(frozen=True)
class Packed:
    """One matrix [N, K] of codes and the parameters of its groups.

    w[n, k] = factor * (scale[g, n] * value(code[n, k]) + shift[g, n]),   g = k // G
    value   = code - base, or what a table says
    shift   = scale * (base - zero) + offset
    """

    bits: int  # of a stored code: 2, 3, 4 or 8
    in_features: int  # K
    out_features: int  # N
    group_size: int  # G, K for a whole row
    plane: int  # V
    words: Tensor  # [N, num_blocks * V / 2] int32
    scales: Tensor  # [num_groups, N] float16, bfloat16 or float32; int8 with steps
    zeros: Tensor | None = None  # [num_groups, N] uint8 or floating; not beside offsets
    offsets: Tensor | None = None  # [num_groups, N] floating; int8 with steps
    steps: Steps | None = None
    center: int = 0  # the zero point where there are no zeros
    factor: float = 1.0
    meaning: int = LINEAR
    table: Tensor | None = None  # [2**bits] bfloat16, of LOOKUP

    @property
    def planes(self) -> int:
        """P: codes in a half-word."""
        return HALF_WORD // self.bits

    @property
    def base(self) -> int:
        """What is taken off a code before it is multiplied. Codes of 8 bits do not fit beside the bias."""
        if self.meaning != LINEAR:
            return 0
        return -BIAS if self.bits < 8 else self.center

    @property
    def has_shift(self) -> bool:
        return self.meaning == LINEAR and not (self.zeros is None and self.offsets is None and self.base == self.center)

    @property
    def num_blocks(self) -> int:
        return 2 * self.words.shape[1] // self.plane

    @property
    def run(self) -> int:
        """Planes in a row that surely share a group: their products are scaled together."""
        if self.group_size >= self.in_features:
            return self.planes
        return math.gcd(self.planes, self.group_size // self.plane)

    @property
    def num_bytes(self) -> int:
        """Bytes that a step reads of the matrix."""
        steps = (None, None) if self.steps is None else (self.steps.scales, self.steps.offsets)
        tensors = (self.words, self.scales, self.zeros, self.offsets, self.table, *steps)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def packed_refusal(spec: LinearSpec) -> str | None:
    """Why a layer of codes has no Triton kernel, or None."""
    if (reason := refusal(spec.device, spec.dtype)) is not None:
        return reason
    if spec.group_size % PLANES[-1] and spec.group_size < spec.in_features:
        return f"groups of {spec.group_size} channels are neither a multiple of {PLANES[-1]} nor the whole row"
    return None


def plane_of(bits: int, in_features: int, group_size: int, meaning: int = LINEAR) -> int:
    """V: the longest plane, unless it crosses groups or a row needs more padding for it. Tables are looked up 32 codes
    at a time: 64 make a thread of sm_80 spill 448 bytes of registers.

    Raises ValueError for groups that no plane divides.
    """
    whole = group_size >= in_features
    fitting = [plane for plane in PLANES if whole or group_size % plane == 0]
    if not fitting:
        raise ValueError(
            f"groups of {group_size} channels have no packed form: they must be a multiple of {PLANES[-1]}"
        )
    planes = HALF_WORD // bits
    longest = min(MAX_BLOCK // planes, PLANES[1] if meaning == LOOKUP else PLANES[0])
    fitting = [plane for plane in fitting if plane <= longest]
    return min(fitting, key=lambda plane: -(-in_features // (planes * plane)) * plane)


def pack(weights: Coded, scales: Tensor, meaning: int = LINEAR, **rest: Any) -> Packed:
    """Canonical codes with scales [N, num_groups] and the `rest` of Packed's fields, as the kernels read them.

    Raises ValueError for groups that no plane divides.
    """
    bits = STORED_BITS[weights.bits]
    plane = plane_of(bits, weights.in_features, weights.group_size, meaning)
    return Packed(
        bits=bits,
        in_features=weights.in_features,
        out_features=weights.out_features,
        group_size=min(weights.group_size, weights.in_features),
        plane=plane,
        words=pack_words(weights.codes, weights.bits, weights.in_features, plane),
        scales=scales.T.contiguous(),
        meaning=meaning,
        **rest,
    )


def pack_words(codes: Tensor, bits: int, in_features: int, plane: int) -> Tensor:
    """Bit stream of `bits` a code, [N, ceil(K bits / 8)] uint8 -> [N, num_blocks * plane / 2] int32 of stored codes.

    Takes up to 16 bytes of scratch memory for each of CODES_AT_ONCE codes, or of one row.
    """
    planes = HALF_WORD // STORED_BITS[bits]
    num_rows, num_blocks = len(codes), -(-in_features // (planes * plane))
    words = torch.zeros(num_rows, num_blocks * plane // 2, dtype=torch.int32, device=codes.device)
    for start in range(0, num_rows, rows_at_once := max(1, CODES_AT_ONCE // in_features)):
        rows = slice(start, start + rows_at_once)
        _pack_rows(unpack_codes(codes[rows], bits, in_features), STORED_BITS[bits], plane, words[rows])
    return words


def _pack_rows(codes: Tensor, stored: int, plane: int, words: Tensor) -> None:
    """codes [rows, K] uint8 into words [rows, num_blocks * plane / 2] of zeros, which are mutated."""
    planes = HALF_WORD // stored
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % (planes * plane)))
    blocks = padded.view(len(codes), -1, planes, plane // 2, 2)  # [rows, num_blocks, P, V / 2, 2]
    target = words.view(len(codes), -1, plane // 2)
    for j in range(planes):
        for half in range(2):
            target |= blocks[:, :, j, :, half].int() << (HALF_WORD * half + j * stored)  # the sign bit is one too
