"""Round a matrix of floats to the affine family: what is done to an output head that a checkpoint left in 16 bits."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import native
from kernels.linear.affine.layout import AffineWeights
from kernels.linear.joined import float_type

if native.MISSING is None or TYPE_CHECKING:
    from kernels.native import _native

CODE_ZERO = 128
SMALLEST_NORMAL_HALF = 2.0**-14
PIECE_WEIGHTS = 1 << 24  # rounded between two calls of `after_piece`


def quantize_symmetric(
    weight: Tensor, group_size: int, after_piece: Callable[[], None] = lambda: None
) -> AffineWeights:
    """weight: [N, K] floating -> 8-bit codes, one scale for `group_size` channels (a multiple of 16 that divides K):

    s = max |w| / 127,   q = round(w / s) + 128,   |w - s (q - 128)| <= (1 / 2 + 2^-4) s

    2^-4 because scales are kept in float16, or in float32 where float16 would lose digits of one. Needs the native
    library: in torch a head of 128,256 x 2,048 would take 4 seconds. `after_piece` may let go of the memory under the
    rows read so far. Raises ValueError for other groups, and when a weight is not finite.
    """
    weight = weight.contiguous()
    num_rows, num_channels = weight.shape
    codes = torch.empty(num_rows, num_channels, dtype=torch.uint8)
    scales = torch.empty(num_rows, num_channels // group_size)
    kind, piece = float_type(weight), max(1, PIECE_WEIGHTS // max(1, num_channels))
    for start in range(0, num_rows, piece):
        rows = weight[start : start + piece]
        addresses = (codes[start:].data_ptr(), scales[start:].data_ptr())
        _native.quantize_rows(rows.data_ptr(), kind, rows.shape[0], num_channels, group_size, *addresses)
        after_piece()
    lowest, highest = torch.aminmax(torch.where(scales == 0, 1, scales))
    if not (lowest.isfinite() and highest.isfinite()):
        raise ValueError("the matrix holds a weight that is not finite")
    fits_half = bool(lowest >= SMALLEST_NORMAL_HALF) and bool(highest <= torch.finfo(torch.half).max)
    zeros = torch.tensor([[CODE_ZERO]], dtype=torch.uint8).expand(scales.shape)
    return AffineWeights(8, num_channels, group_size, codes, scales.half() if fits_half else scales, zeros)
