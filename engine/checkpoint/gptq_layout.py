"""The tensors of a layer as GPTQ packs them, which AutoRound writes as well (gptq.py says what they are).

"Planar" words, in GPTQModel's gptq_p: 32 codes of 3, 5, 6 or 7 bits lie as planes of 4, 2 and 1 bits, the lowest first,
each plane whole words. Zero points lie likewise, along the outputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.checkpoint.codes import input_order, num_words, reorder_codes, words_to_stream, words_to_zeros
from engine.checkpoint.errors import TensorError
from engine.checkpoint.linear import read_bias, take_scales
from engine.checkpoint.source import Source
from kernels.linear.affine.layout import AffineWeights
from kernels.linear.bitstream import pack_codes, unpack_codes
from kernels.linear.transforms import Permutation
from kernels.linear.weights import LinearWeights

ONE_IN_EVERY_FIELD = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # bits -> word
PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}  # bits of each plane; other widths have one
PER_BLOCK = 32  # codes whose planes stand together
ROWS_AT_ONCE = 1 << 9  # planar rows are unpacked in pieces of so many, to bound the memory


@dataclass(frozen=True)
class GptqLayout:
    """What the tensors of one layer do not say themselves."""

    bits: int
    group_size: int  # -1: the whole row
    minus_one: bool  # qzeros hold z - 1
    planar: bool = False


def read_layer(source: Source, name: str, shape: tuple[int, int], bias: bool, layout: GptqLayout) -> LinearWeights:
    """The layer `name`; shape is (out_features, in_features). Raises TensorError."""
    out_features, in_features = shape
    bits = layout.bits
    planar = layout.planar and bits in PLANES
    if planar and (out_features % PER_BLOCK or in_features % PER_BLOCK):
        raise TensorError(
            f"{name} is {out_features} x {in_features}, but {bits}-bit planes hold {PER_BLOCK} codes each"
        )
    group_size = in_features if layout.group_size == -1 else min(layout.group_size, in_features)
    num_groups = -(-in_features // group_size)
    qweight = source.take(f"{name}.qweight", (num_words(in_features, bits), out_features), (torch.int32,))
    qzeros = source.take(f"{name}.qzeros", (num_groups, num_words(out_features, bits)), (torch.int32,))
    scales = take_scales(source, f"{name}.scales", (num_groups, out_features))
    codes = planes_to_stream(qweight.t(), bits) if planar else words_to_stream(qweight.t(), bits, in_features)
    order = _order(source, f"{name}.g_idx", in_features, group_size)  # [in] or None
    if order is not None:
        codes = reorder_codes(codes, bits, order)
    weights = AffineWeights(
        bits=bits,
        in_features=in_features,
        group_size=group_size,
        codes=codes,  # [out, in * bits / 8]
        scales=scales.t().contiguous(),  # [out, groups]
        zeros=_zeros(qzeros, out_features, layout, planar),  # [out, groups]
    )
    pre = () if order is None else (Permutation(order),)
    return LinearWeights((weights,), pre, read_bias(source, name, out_features, bias))


def planes_to_stream(words: Tensor, bits: int) -> Tensor:
    """Planar words [rows, num_words] int32 -> [rows, num_codes * bits / 8] uint8."""
    return torch.cat([pack_codes(_planes_to_codes(rows, bits), bits) for rows in torch.split(words, ROWS_AT_ONCE)])


def _planes_to_codes(words: Tensor, bits: int) -> Tensor:
    """[rows, num_words] int32 -> [rows, num_codes] uint8."""
    blocks = words.contiguous().view(words.shape[0], -1, bits)  # [rows, blocks, bits]
    codes = torch.zeros(words.shape[0], blocks.shape[1], PER_BLOCK, dtype=torch.uint8)
    start = 0  # a plane of b bits takes b words of a block
    for width in PLANES[bits]:
        plane = blocks[..., start : start + width].contiguous().view(torch.uint8)  # [rows, blocks, 4 * width]
        codes |= unpack_codes(plane.flatten(0, 1), width, PER_BLOCK).view(codes.shape) << start
        start += width
    return codes.flatten(1)


def _zeros(qzeros: Tensor, out_features: int, layout: GptqLayout, planar: bool) -> Tensor:
    """[groups, words] int32 -> [out, groups] uint8."""
    bits = layout.bits
    if planar:
        return _planes_to_codes(qzeros, bits).t().contiguous()
    if not layout.minus_one:
        return words_to_zeros(qzeros, bits, out_features)
    if bits in ONE_IN_EVERY_FIELD:
        return words_to_zeros(qzeros + ONE_IN_EVERY_FIELD[bits], bits, out_features)
    return (words_to_zeros(qzeros, bits, out_features) + 1) & ((1 << bits) - 1)


def _order(source: Source, key: str, in_features: int, group_size: int) -> Tensor | None:
    if key not in source:
        return None
    g_idx = source.take(key, (in_features,), (torch.int32, torch.int64))
    return input_order(g_idx, group_size, key)
