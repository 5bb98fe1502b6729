"""The affine family in C++: integer dot products with activations rounded to 8 bits (kernels/native/linear.hpp)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import native
from kernels.contract import LinearSpec
from kernels.linear.affine.layout import AffineWeights
from kernels.linear.blocks import check_width

if native.MISSING is None or TYPE_CHECKING:
    from kernels.native import _native

BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Joined:
    """Matrices that read the same activations."""

    group: "_native.Group"
    in_features: int
    rows: tuple[int, ...]  # out_features of each


class AffineNative:
    """y[t, n] = sum_j s[n, j] x_scale[t, j] (sum_{k in j} q[n, k] a[t, k] - z[n, j] sum_{k in j} a[t, k])

    where j are blocks of at most 128 channels inside the groups, and a = round(x / x_scale), x_scale = max |x| / 127 of
    a token's block. The inner sums are exact integers; the outer one runs in order, so that a result is the same to
    the last bit for any batch, any number of threads and any instruction set.

    Reads num_bytes of weights once for up to 8 tokens; 2 T N K integer operations.
    """

    name = "native"

    def refuses(self, spec: LinearSpec) -> str | None:
        if (reason := native.refusal(spec.device, spec.dtype)) is not None:
            return reason
        if spec.exact_activations:
            return "rounds activations to 8 bits, and exact ones were asked for"
        if spec.bits not in BITS:
            return f"{spec.bits}-bit codes have no packed form; {', '.join(map(str, BITS))} bits have"
        if spec.group_size % 16 and spec.group_size < spec.in_features:
            return f"groups of {spec.group_size} channels are neither a multiple of 16 nor the whole row"
        return None

    def prepare(self, weights: AffineWeights) -> "_native.Packed":
        """Repack into blocks of 16 rows. Raises ValueError for groups the kernels do not serve."""
        first = weights.zeros.flatten()[0] if weights.zeros.numel() else torch.tensor(0)
        constant = weights.zeros.dtype == torch.uint8 and bool((weights.zeros == first).all())
        zeros = weights.zeros.contiguous() if weights.zeros.dtype == torch.uint8 else weights.zeros.float().contiguous()
        return _native.pack(
            weights.bits,
            weights.in_features,
            weights.group_size,
            weights.codes.contiguous(),
            weights.scales.contiguous(),
            None if constant else zeros,
            int(first) if constant else 0,
        )

    def join(self, prepared: "Sequence[_native.Packed]") -> Joined | None:
        """None when the matrices cut their channels into blocks of different lengths."""
        if len({packed.block_channels for packed in prepared}) != 1:
            return None
        rows = tuple(packed.num_rows for packed in prepared)
        return Joined(_native.Group(list(prepared)), prepared[0].num_channels, rows)

    def linear(self, x: Tensor, joined: Joined) -> tuple[Tensor, ...]:
        """x: [num_tokens, K] float32 -> [num_tokens, N] float32 for each matrix."""
        check_width(x, joined.in_features)
        x = x.contiguous()
        outs = tuple(torch.empty(x.shape[0], rows) for rows in joined.rows)
        joined.group.run(x.data_ptr(), x.shape[0], [out.data_ptr() for out in outs])
        return outs
