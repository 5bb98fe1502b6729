"""The sparse family on NVIDIA GPUs, in Triton (kernels/gpu/sparse.py)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.contract import LinearSpec
from kernels.gpu import refusal
from kernels.gpu.tiles import ANY, Tile
from kernels.linear.blocks import check_width
from kernels.linear.sparse.layout import SparseWeights

CHUNK = 16  # entries of a row at a time
TILES = (Tile(8, 8, 16, 2, 1), Tile(ANY, 64, 4, 4, 1))
FIXED = (Tile(ANY, 8, 16, 2, 1),)


class SparseTriton:
    """y[t, n] = sum_i x[t, column[i]] * value[i],  i the entries of row n,  in order, in float32

    Reads num_bytes of weights once for up to 64 tokens; 2 T operations an entry. Nothing is rounded but the result.
    """

    def __init__(self, fixed: bool = False) -> None:
        self._fixed = fixed
        self.name = "triton-fixed" if fixed else "triton"

    def refuses(self, spec: LinearSpec) -> str | None:
        return refusal(spec.device, spec.dtype)

    def prepare(self, weights: SparseWeights) -> SparseWeights:
        return weights

    def join(self, prepared: Sequence[SparseWeights]) -> tuple[SparseWeights, ...]:
        return tuple(prepared)

    def linear(self, x: Tensor, joined: tuple[SparseWeights, ...]) -> tuple[Tensor, ...]:
        """x: [num_tokens, K] bfloat16 -> [num_tokens, N] bfloat16 for each matrix. Raises ValueError for another K."""
        for weights in joined:
            check_width(x, weights.in_features)
        if x.dtype != torch.bfloat16:
            raise ValueError(f"activations must be bfloat16, found {x.dtype}")
        outs = tuple(x.new_empty(x.shape[0], weights.out_features) for weights in joined)
        channels = x.t().contiguous()  # [K, num_tokens]
        for weights, out in zip(joined, outs, strict=True):
            multiply(channels, weights, out, self._fixed)
        return outs


def multiply(x: Tensor, weights: SparseWeights, y: Tensor, fixed: bool = False) -> None:
    """x: [K, num_tokens] bfloat16; mutates y: [num_tokens, N] floating, rounded to once. Both contiguous."""
    from kernels.gpu import sparse

    num_tokens, n = y.shape
    if not num_tokens or not n:
        return
    tile = next(tile for tile in (FIXED if fixed else TILES) if num_tokens <= tile.max_tokens)
    kernel: Any = sparse.multiply
    kernel[-(-n // tile.block_n), -(-num_tokens // tile.block_m)](
        x,
        weights.starts,
        weights.columns,
        weights.values,
        y,
        num_tokens,
        n,
        CHUNK=CHUNK,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
    )
