"""How codes lie on a GPU: in half-words, plane by plane.

The channels of a row go in blocks of P planes of V channels, P = 16 // b. A word, int32, holds two neighbouring
channels of each plane: word i of a block those numbered j V + 2 i and j V + 2 i + 1. Codes that stand for themselves
lie in its halves,

    half[n, B, i] = sum_j code[n, (B P + j) V + i] << (j b),

so that one shift and one mask leave the codes of plane j for two channels, each in the mantissa of a bfloat16, which is
how tensor cores take them: half an instruction a weight for each. kernels/gpu/codes.py says where other codes lie.

A plane meets V activations that follow each other. No plane crosses the border of a group, V divides the group size;
but where scaled values are bfloat16 as they are (`exact_scales`) a plane may hold several whole groups.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from kernels.contract import LinearSpec
from kernels.gpu import refusal
from kernels.gpu.codes import HALF_WORD, as_e2m1, in_bytes, in_halves, words_of
from kernels.gpu.configs import Configs, configs_for, default_configs
from kernels.linear.bitstream import unpack_codes

PLANES = (64, 32, 16)  # channels; a product takes no less than 16
MAX_BLOCK = 320  # channels: a block of activations of 128 tokens is 80 KiB of shared memory
STORED_BITS = {1: 2, 2: 2, 3: 3, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}  # by bits of a code: widths that kernels are checked for
CODES_AT_ONCE = 1 << 24  # that are unpacked together: the head of an 8B model has 525 million
NIBBLE = 4  # bits of a code that is looked up
BIAS = 128  # 0x4300 | code is the bfloat16 128 + code, for codes of up to 7 bits; of 8 bits it is taken off
FLOAT_BITS = (0x43004300, 0xC300C300)  # of 128 and of -128, twice: what makes a bfloat16 of the bits of a code
EXACT_BITS = 6  # of a scale, that times an E2M1, which has 2, is a bfloat16, which has 8
SMALL_FLOAT = 126  # E2M1 is found 2^-126 of what it means


# What a code means: itself less `base`, the small float of MXFP4 and NVFP4, an entry of `table`.
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
    value   = code - base, E2M1, or what a table says
    shift   = scale * (base - zero) + offset
    """

    bits: int  # of a stored code: 2, 3, 4 or 8
    in_features: int  # K
    out_features: int  # N
    group_size: int  # G, K for a whole row
    plane: int  # V
    words: Tensor  # [N, num_blocks * V / 2] int32
    scales: Tensor  # [num_groups, N] float16, bfloat16 or float32; int8 with steps; see exact_scales
    zeros: Tensor | None = None  # [num_groups, N] uint8 or floating; not beside offsets
    offsets: Tensor | None = None  # [num_groups, N] floating; int8 with steps
    steps: Steps | None = None
    center: int = 0  # the zero point where there are no zeros
    factor: float = 1.0
    meaning: int = LINEAR
    table: Tensor | None = None  # int32: [8] ByteTable.words of LOOKUP, [2] FLOAT_BITS of LINEAR
    mixed_table: bool = False  # ByteTable.mixed
    configs: Configs = field(default_factory=default_configs)  # how its products are cut into programs
    exact_scales: bool = False  # scales are [N, groups of whole blocks] bfloat16; they and 2^-126 E2M1 are multiplied
    joined_rows: tuple[int, ...] = ()  # N of each of the matrices that this is made of (kernels/gpu/joining.py)

    @property
    def codes(self) -> str:
        """What tables of configurations call its codes."""
        return codes_of(self.bits, self.meaning)

    @property
    def rows(self) -> tuple[int, ...]:
        """N of each matrix whose results stand one after the other, [T, N] each."""
        return self.joined_rows or (self.out_features,)

    @property
    def planes(self) -> int:
        """P: codes in a half-word."""
        return HALF_WORD // self.bits

    @property
    def base(self) -> int:
        """What a code is above the value that is made of it."""
        if self.meaning != LINEAR:
            return 0
        return -BIAS if self.bits < 8 else BIAS

    @property
    def has_shift(self) -> bool:
        return self.meaning == LINEAR and not (self.zeros is None and self.offsets is None and self.base == self.center)

    @property
    def num_blocks(self) -> int:
        return 2 * self.words.shape[1] // self.plane

    @property
    def num_groups(self) -> int:
        return self.scales.shape[1] if self.exact_scales else self.scales.shape[0]

    @property
    def groups_of_plane(self) -> int:
        """Scales that a plane is multiplied by before products; 0 where sums are scaled."""
        return max(1, self.plane // self.group_size) if self.exact_scales else 0

    @property
    def run(self) -> int:
        """Planes in a row that surely share a group: their products are scaled together."""
        if self.group_size >= self.in_features or self.exact_scales:
            return self.planes
        return math.gcd(self.planes, self.group_size // self.plane)

    @property
    def num_bytes(self) -> int:
        """Bytes that a step reads of the matrix."""
        steps = (None, None) if self.steps is None else (self.steps.scales, self.steps.offsets)
        tensors = (self.words, self.scales, self.zeros, self.offsets, self.table, *steps)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def codes_of(bits: int, meaning: int) -> str:
    """One of kernels.gpu.configs.CODES."""
    return {E2M1: "e2m1", LOOKUP: "lookup"}.get(meaning, f"{bits}-bit")


def packed_refusal(spec: LinearSpec) -> str | None:
    """Why a layer of codes has no Triton kernel, or None."""
    if (reason := refusal(spec.device, spec.dtype)) is not None:
        return reason
    if spec.group_size % PLANES[-1] and spec.group_size < spec.in_features:
        return f"groups of {spec.group_size} channels are neither a multiple of {PLANES[-1]} nor the whole row"
    return None


def plane_of(bits: int, in_features: int, group_size: int, meaning: int = LINEAR, exact_scales: bool = False) -> int:
    """V: the longest plane, unless it crosses groups or a row needs more padding for it. Tables are looked up 32 codes
    at a time: 64 take 185 registers in place of 102.

    Raises ValueError for groups that no plane divides.
    """
    whole = group_size >= in_features
    fitting = [p for p in PLANES if whole or group_size % p == 0 or (exact_scales and p % group_size == 0)]
    if not fitting:
        raise ValueError(
            f"groups of {group_size} channels have no packed form: they must be a multiple of {PLANES[-1]}"
        )
    planes = HALF_WORD // bits
    longest = min(MAX_BLOCK // planes, PLANES[1] if meaning == LOOKUP else PLANES[0])
    fitting = [plane for plane in fitting if plane <= longest]
    return min(fitting, key=lambda plane: -(-in_features // (planes * plane)) * plane)


def pack(weights: Coded, scales: Tensor, meaning: int = LINEAR, order: Sequence[int] = (), **rest: Any) -> Packed:
    """Canonical codes with scales [N, num_groups] and the `rest` of Packed's fields, as the kernels read them.

    order: what is stored for each code, itself unless it is given. Raises ValueError for groups that no plane divides.
    """
    bits = NIBBLE if meaning == LOOKUP else STORED_BITS[weights.bits]
    is_exact = meaning == E2M1 and are_short(scales)
    plane = plane_of(bits, weights.in_features, weights.group_size, meaning, is_exact)
    if meaning == E2M1:
        lie = as_e2m1()
    else:
        lie = in_bytes(order) if meaning == LOOKUP else in_halves(bits, order or range(1 << bits))
    packed = Packed(
        bits=bits,
        in_features=weights.in_features,
        out_features=weights.out_features,
        group_size=min(weights.group_size, weights.in_features),
        plane=plane,
        words=pack_words(weights.codes, weights.bits, weights.in_features, plane, lie),
        scales=scales if is_exact else scales.T.contiguous(),
        meaning=meaning,
        configs=configs_for(scales.device, codes_of(bits, meaning), weights.out_features, weights.in_features),
        **({"table": words_of(FLOAT_BITS).to(scales.device)} if meaning == LINEAR else {}) | rest,
    )
    return with_exact_scales(packed) if is_exact else packed


def are_short(scales: Tensor) -> bool:
    """Whether EXACT_BITS hold every scale: those of MXFP4 are powers of two, those of NVFP4 have 4 bits."""
    mantissa, _ = scales.float().frexp()
    return bool((mantissa.ldexp(torch.tensor(EXACT_BITS)).frac() == 0).all())


def with_exact_scales(packed: Packed) -> Packed:
    """Scales [N, num_groups] as the kernels multiply them into values: groups of whole blocks, and by the power of two
    that makes the largest one 2^126 or more, which the factor takes off again together with 2^-126. What is below
    2^-117 of the largest loses bits, and is gone below 2^-126."""
    scales, each = packed.scales.double(), max(1, packed.plane // packed.group_size)
    largest = scales.abs().nan_to_num(0).max() if scales.numel() else torch.zeros((), dtype=torch.float64)
    exponent = int(largest.frexp().exponent) if largest > 0 else 0  # largest < 2^exponent
    padded = scales.new_zeros(len(scales), max(scales.shape[1], packed.num_blocks * packed.planes * each))
    padded[:, : scales.shape[1]] = scales * 2.0 ** (BIAS - 1 - exponent)
    factor = packed.factor * 2.0 ** (exponent - 1)
    return replace(packed, scales=padded.to(torch.bfloat16), factor=factor, exact_scales=True)


def pack_words(codes: Tensor, bits: int, in_features: int, plane: int, lie: Tensor) -> Tensor:
    """Bit stream of `bits` a code, [N, ceil(K bits / 8)] uint8 -> [N, num_blocks * plane / 2] int32.

    lie: [P, 2, codes] int32, see kernels/gpu/codes.py. Takes up to 16 bytes of scratch memory for each of CODES_AT_ONCE
    codes, or of one row.
    """
    planes = lie.shape[0]
    num_rows, num_blocks = len(codes), -(-in_features // (planes * plane))
    words = torch.zeros(num_rows, num_blocks * plane // 2, dtype=torch.int32, device=codes.device)
    for start in range(0, num_rows, rows_at_once := max(1, CODES_AT_ONCE // in_features)):
        rows = slice(start, start + rows_at_once)
        _pack_rows(unpack_codes(codes[rows], bits, in_features), plane, lie.to(codes.device), words[rows])
    return words


def _pack_rows(codes: Tensor, plane: int, lie: Tensor, words: Tensor) -> None:
    """codes [rows, K] uint8 into words [rows, num_blocks * plane / 2] of zeros, which are mutated."""
    planes = lie.shape[0]
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % (planes * plane)))
    blocks = padded.view(len(codes), -1, planes, plane // 2, 2)  # [rows, num_blocks, P, V / 2, 2]
    target = words.view(len(codes), -1, plane // 2)
    for j in range(planes):
        for half in range(2):
            target ^= lie[j, half][blocks[:, :, j, :, half].long()]
