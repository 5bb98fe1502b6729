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

    2^-4 because scales are kept in float16, or in float32 where float16 would lose digits of one. In torch, without the
    native library, a head of 128,256 x 2,048 takes 4 seconds. `after_piece` may let go of the memory under the rows
    read so far. Raises ValueError for other groups, and when a weight is not finite.
    """
    weight = weight.contiguous()
    num_rows, num_channels = weight.shape
    if group_size % 16 or num_channels % group_size:
        raise ValueError(f"groups of {group_size} must be multiples of 16 that divide rows of {num_channels} channels")
    codes = torch.empty(num_rows, num_channels, dtype=torch.uint8)
    scales = torch.empty(num_rows, num_channels // group_size)
    piece = max(1, PIECE_WEIGHTS // max(1, num_channels))
    for start in range(0, num_rows, piece):
        at = slice(start, start + piece)
        if native.MISSING is None:
            _round(weight[at], group_size, codes[at], scales[at])
        else:
            codes[at], scales[at] = rounded(weight[at], group_size)
        after_piece()
    lowest, highest = torch.aminmax(torch.where(scales == 0, 1, scales))
    if not (lowest.isfinite() and highest.isfinite()):
        raise ValueError("the matrix holds a weight that is not finite")
    fits_half = bool(lowest >= SMALLEST_NORMAL_HALF) and bool(highest <= torch.finfo(torch.half).max)
    zeros = torch.tensor([[CODE_ZERO]], dtype=torch.uint8).expand(scales.shape)
    return AffineWeights(8, num_channels, group_size, codes, scales.half() if fits_half else scales, zeros)


def _round(weight: Tensor, group_size: int, codes: Tensor, scales: Tensor) -> None:
    """`rounded`, to codes and scales, by the native library."""
    addresses = (codes.data_ptr(), scales.data_ptr())
    num_rows, num_channels = weight.shape
    _native.quantize_rows(weight.data_ptr(), float_type(weight), num_rows, num_channels, group_size, *addresses)


def rounded(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """weight: [rows, K] -> codes [rows, K] uint8 and scales [rows, K / group_size] float32, in torch."""
    groups = weight.float().view(len(weight), -1, group_size)  # [rows, groups, group_size]
    scales = groups.abs().amax(-1) / 127
    codes = (groups / torch.where(scales == 0, 1, scales).unsqueeze(-1)).round() + CODE_ZERO
    return codes.nan_to_num(0).to(torch.uint8).flatten(1), scales
