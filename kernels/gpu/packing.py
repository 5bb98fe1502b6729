"""How codes lie on a GPU: plane-major words.

The channels of a row go in blocks of P planes of W channels. Word i of a block holds, for each plane j, the code of
channel j W + i of the block in its bits [j b, (j + 1) b):

    word[n, B, i] = sum_j code[n, (B P + j) W + i] << (j b),      P = 32 // b

so that one load of W words gives P tiles of W codes by a shift each, and a tile meets W activations that follow each
other. No plane crosses the border of a group: W divides the group size.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.contract import LinearSpec
from kernels.gpu import refusal
from kernels.linear.bitstream import unpack_codes

WORD_BITS = 32
PLANES = (32, 16)  # channels; tl.dot takes no less than 16
STORED_BITS = {1: 2, 2: 2, 3: 3, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}  # by bits of a code: widths that kernels are checked for

# What a code means: itself less `center`, the small float of MXFP4, an entry of `table`.
LINEAR, E2M1, LOOKUP = 0, 1, 2


@dataclass(frozen=True)
class Packed:
    """One matrix [N, K] of codes and the parameters of its groups.

    w[n, k] = factor * (scale[g, n] * value(code[n, k]) + shift[g, n]),   g = k // G
    shift   = scale * (center - zero), or the stored offset, or 0
    """

    bits: int  # of a stored code: 2, 3, 4 or 8
    in_features: int  # K
    out_features: int  # N
    group_size: int  # G, K for a whole row
    plane: int  # W
    words: Tensor  # [N, num_blocks * W] int32
    scales: Tensor  # [num_groups, N] float16, bfloat16 or float32
    zeros: Tensor | None = None  # [num_groups, N] uint8 or floating; not beside offsets
    offsets: Tensor | None = None  # [num_groups, N] floating
    center: int = 0  # what is taken off every code before it is multiplied
    factor: float = 1.0
    meaning: int = LINEAR
    table: Tensor | None = None  # [2**bits] bfloat16, of LOOKUP

    @property
    def planes(self) -> int:
        """P: codes in a word."""
        return WORD_BITS // self.bits

    @property
    def num_blocks(self) -> int:
        return self.words.shape[1] // self.plane

    @property
    def run(self) -> int:
        """Planes in a row that surely share a group: their products are scaled together."""
        if self.group_size >= self.in_features:
            return self.planes
        return math.gcd(self.planes, self.group_size // self.plane)

    @property
    def num_bytes(self) -> int:
        """Bytes that a step reads of the matrix."""
        tensors = (self.words, self.scales, self.zeros, self.offsets, self.table)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def packed_refusal(spec: LinearSpec) -> str | None:
    """Why a layer of codes has no Triton kernel, or None."""
    if (reason := refusal(spec.device, spec.dtype)) is not None:
        return reason
    if spec.group_size % PLANES[-1] and spec.group_size < spec.in_features:
        return f"groups of {spec.group_size} channels are neither a multiple of {PLANES[-1]} nor the whole row"
    return None


def plane_of(bits: int, in_features: int, group_size: int) -> int:
    """W: the longer plane, unless it crosses groups or a row needs more padding for it.

    Raises ValueError for groups that no plane divides.
    """
    whole = group_size >= in_features
    fitting = [plane for plane in PLANES if whole or group_size % plane == 0]
    if not fitting:
        raise ValueError(
            f"groups of {group_size} channels have no packed form: they must be a multiple of {PLANES[-1]}"
        )
    planes = WORD_BITS // bits
    return min(fitting, key=lambda plane: -(-in_features // (planes * plane)) * plane)


def pack_words(codes: Tensor, bits: int, in_features: int, plane: int) -> Tensor:
    """Bit stream of `bits` a code, [N, ceil(K bits / 8)] uint8 -> words [N, num_blocks * plane] int32 of stored codes.

    Takes 8 bytes a code of scratch memory.
    """
    stored = STORED_BITS[bits]
    planes = WORD_BITS // stored
    wide = unpack_codes(codes, bits, in_features)  # [N, K] uint8
    padded = torch.nn.functional.pad(wide, (0, -in_features % (planes * plane)))
    blocks = padded.view(len(codes), -1, planes, plane)  # [N, num_blocks, P, W]
    words = torch.zeros(len(codes), blocks.shape[1], plane, dtype=torch.int32, device=codes.device)
    for j in range(planes):
        words |= blocks[:, :, j].int() << (j * stored)  # the sign bit is a bit like others
    return words.flatten(1)
