"""What every reference of the linear families shares: dequantize a block of rows, multiply, forget the block.

Tokens go through in tiles of a fixed number of rows, the last one filled up with zeros. A matrix product chooses its
order of summation by the shapes it is given, so a token's result would otherwise depend on how many others share the
step; with one shape it is the same to the last bit, whatever the batch and the chunk.
"""

from collections.abc import Callable

import torch
from torch import Tensor

MAX_BLOCK_ELEMENTS = 1 << 20  # of one dequantized block: 4 MB of float32, which stays in the cache between the passes
# One token costs as much as 16: at 2,048 x 2,048, 4 bits, one thread, 1.9 ms in place of 0.2, beside 5.0 ms to
# dequantize. A prompt of 512 tokens takes 49 ms in place of 37.
TILE_TOKENS = 16


def check_width(x: Tensor, in_features: int) -> None:
    """Raise ValueError when x is not [num_tokens, in_features]."""
    if x.ndim != 2 or x.shape[1] != in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}, the weights take [num_tokens, {in_features}]")


def multiply_by_blocks(x: Tensor, shape: tuple[int, int], rows: Callable[[int, int], Tensor]) -> Tensor:
    """Return x @ W^T in x's dtype, computed in float32, without ever holding a float32 copy of W.

    x: [num_tokens, in_features]; shape: (out_features, in_features) of W; rows(start, stop) returns rows
    start..stop of W as [stop - start, in_features] float32. Raises ValueError when x is not as wide as W.
    """
    out_features, in_features = shape
    check_width(x, in_features)
    block = max(1, MAX_BLOCK_ELEMENTS // in_features)
    num_tokens = x.shape[0]
    padded = torch.nn.functional.pad(x.float(), (0, 0, 0, -num_tokens % TILE_TOKENS))
    tiles = padded.view(-1, TILE_TOKENS, in_features)  # [num_tiles, TILE_TOKENS, in_features]
    result = torch.empty(len(tiles), TILE_TOKENS, out_features, dtype=x.dtype, device=x.device)
    for start in range(0, out_features, block):
        stop = min(start + block, out_features)
        weight = rows(start, stop).T  # [in_features, stop - start]
        for tile, out in zip(tiles, result, strict=True):
            out[:, start:stop] = tile @ weight
    return result.view(-1, out_features)[:num_tokens]
