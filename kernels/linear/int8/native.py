"""The int8 family in C++: activations rounded as the format says, then products of packed weights in float32."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import native
from kernels.contract import LinearSpec
from kernels.linear.bitstream import pack_codes
from kernels.linear.int8.layout import Int8Weights
from kernels.linear.joined import FloatKernel, Joined, packed_refusal
from kernels.linear.rounding import Rounding
from kernels.linear.transforms import same

if native.MISSING is None or TYPE_CHECKING:
    from kernels.native import _native


@dataclass(frozen=True)
class Prepared:
    """One matrix and the rounding of its activations."""

    packed: "_native.Packed"
    rounding: Rounding

    @property
    def num_bytes(self) -> int:
        return self.packed.num_bytes


@dataclass(frozen=True)
class RoundedJoined:
    """Matrices that read activations rounded alike."""

    joined: Joined
    rounding: Rounding


class Int8Native:
    """y[t, n] = sum_j s[n, j] sum_{k in j} x^[t, k] (q[n, k] - z[n, j]),   x^ = rounding(x), j blocks of 128 channels

    Inside a block x^ is a scale times integers. Sums run in order in float32: a result has the same bits for any
    batch, any number of threads and any instruction set.

    Reads `bits` of each weight once for up to 4 tokens; 2 T N K operations, and 3 to 5 for each weight to unpack it.
    """

    name = "native"

    def __init__(self) -> None:
        self._floats = FloatKernel()

    def refuses(self, spec: LinearSpec) -> str | None:
        return packed_refusal(spec)

    def prepare(self, weights: Int8Weights) -> Prepared:
        """Repack into blocks of 16 rows. Raises ValueError for groups without a packed form."""
        bits = 8 if weights.bits == 7 else weights.bits
        middle = 1 << (bits - 1)
        codes = (weights.weight.short() + middle).to(torch.uint8)  # [N, K]
        zeros = None if weights.zeros is None else (weights.zeros.short() + middle).to(torch.uint8).contiguous()
        packed = _native.pack(
            bits,
            weights.in_features,
            weights.group_size,
            pack_codes(codes, bits).contiguous(),
            weights.scales.contiguous(),
            zeros,
            middle if zeros is None else 0,
        )
        return Prepared(packed, weights.rounding)

    def join(self, prepared: Sequence[Prepared]) -> RoundedJoined | None:
        """None when the matrices round their activations differently."""
        first = prepared[0].rounding
        if not all(same((first,), (one.rounding,)) for one in prepared):
            return None
        return RoundedJoined(self._floats.join([one.packed for one in prepared]), first)

    def linear(self, x: Tensor, joined: RoundedJoined) -> tuple[Tensor, ...]:
        """x: [num_tokens, K] float32 -> [num_tokens, N] float32 for each matrix."""
        return self._floats.linear(joined.rounding.apply(x), joined.joined)
