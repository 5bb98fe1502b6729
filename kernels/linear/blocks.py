"""What every reference of the linear families shares: dequantize a block of rows, multiply, forget the block."""

from collections.abc import Callable

import torch
from torch import Tensor

MAX_BLOCK_ELEMENTS = 1 << 20  # of one dequantized block: 4 MB of float32, which stays in the cache between the passes


def multiply_by_blocks(x: Tensor, shape: tuple[int, int], rows: Callable[[int, int], Tensor]) -> Tensor:
    """Return x @ W^T in x's dtype, computed in float32, without ever holding a float32 copy of W.

    x: [num_tokens, in_features]; shape: (out_features, in_features) of W; rows(start, stop) returns rows
    start..stop of W as [stop - start, in_features] float32.
    """
    out_features, in_features = shape
    block = max(1, MAX_BLOCK_ELEMENTS // in_features)
    inputs = x.float()  # [num_tokens, in_features]
    result = torch.empty(x.shape[0], out_features, dtype=x.dtype, device=x.device)
    for start in range(0, out_features, block):
        stop = min(start + block, out_features)
        result[:, start:stop] = inputs @ rows(start, stop).T
    return result
