"""HQQ checkpoints in safetensors, as hqq and transformers write them.

    w.flat[i] = scale[i // group_size] * (q[i] - zero[i // group_size])      axis 1, groups along the inputs
    w.flat[i] = scale[i % num_groups] * (q[i] - zero[i % num_groups])        axis 0, groups along the outputs

    W_q        codes of [groups, group_size], packed along the groups: the first half of the groups in the high nibbles
               of 4 bits, quarters and eighths of 2 and 1 bits likewise; 3 bits: ten tenths in 30 bits of an int32;
               5, 6 and 8 bits: a byte each. May be stored as floats of the same bytes (view_as_float).
    scale      [groups, 1]  float16, bfloat16 or float32
    zero       [groups, 1]  likewise: zero points are not integers
               axis 0: W_q is [group_size, groups], packed along group_size; scale and zero are [1, groups]
    shape      [2]          (out, in)
    nbits, group_size, axis, channel_wise, quant_scale, quant_zero   numbers, as tensors of no dimension

Every layer says how it is stored, so that a checkpoint needs no quantization_config; hqq's own save writes none.
With axis 0 each weight of a row has a scale of its own, which no kernel here reads: those layers are dequantized at
load and cost the bits of the dtype of their scales.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import msgspec
import torch
from torch import Tensor

from engine.checkpoint.blocks import blocks_to_groups
from engine.checkpoint.errors import FormatRefused, TensorError
from engine.checkpoint.linear import present, read_bias, read_dense, read_settings, take_scales
from engine.checkpoint.source import FLOATS, Source
from kernels.linear.affine.layout import AffineWeights
from kernels.linear.bitstream import pack_codes
from kernels.linear.dense.layout import DenseWeights
from kernels.linear.weights import LinearWeights

WHERE = "HQQ config"
MARK = "W_q"  # the tensor by which a layer is known
# How a layer was made, or would be held in memory by the tool.
INFORMATIONAL_PARTS = (
    "compute_dtype",
    "encoded_state_dict",
    "offload_meta",
    "optimize",
    "packing",
    "round_zero",
    "stores_quant_config",
    "unpack_view_dtype",
    "view_as_float",
)
OFF_PARTS = ("quant_scale", "quant_zero")  # scales and zero points that are themselves quantized
INFORMATIONAL = frozenset({"quant_config", "quant_method", "skip_modules"})
NUMBERS = (torch.uint8, torch.int32, torch.int64, *FLOATS)
SLICES = MappingProxyType({1: 8, 2: 4, 3: 10, 4: 2, 5: 1, 6: 1, 8: 1})  # bits -> codes that share a word
TERNARY_NBITS = 1.58  # codes 0, 1 and 2, stored as 2 bits
MAX_GROUP_SIZE = 1 << 20


class _Settings(msgspec.Struct, frozen=True):
    """Nothing: layers are stored with their settings."""


@dataclass(frozen=True)
class Hqq:
    """The reader of HQQ checkpoints."""

    name: str = "hqq"

    def describe(self) -> str:
        return "HQQ"

    def linear(self, source: Source, name: str, shape: tuple[int, int], bias: bool) -> LinearWeights:
        if f"{name}.{MARK}" not in source:
            return read_dense(source, name, shape, bias)
        bits, group_size = _read_settings(source, name, shape)
        num_groups = shape[0] * shape[1] // group_size
        if _number(source, f"{name}.axis") == 0:
            dense = _dequantize_axis_0(source, name, bits, (group_size, num_groups)).view(shape)
            return LinearWeights((DenseWeights(dense),), bias=read_bias(source, name, shape[0], bias))
        codes = _codes(source, f"{name}.{MARK}", bits, (num_groups, group_size))
        scale = take_scales(source, f"{name}.scale", (num_groups, 1)).flatten()
        zero = take_scales(source, f"{name}.zero", (num_groups, 1)).flatten()
        row_group, scales = blocks_to_groups(scale, group_size, shape)
        weights = AffineWeights(
            bits=bits,
            in_features=shape[1],
            group_size=row_group,
            codes=pack_codes(codes.view(shape), bits),  # [out, in * bits / 8]
            scales=scales,  # [out, in / row_group]
            zeros=blocks_to_groups(zero, group_size, shape)[1],
        )
        return LinearWeights((weights,), bias=read_bias(source, name, shape[0], bias))


def read_config(config: Mapping[str, Any]) -> Hqq:
    """Build the reader from a quantization config. Raises FormatRefused naming the setting that is not supported."""
    read_settings(config, _Settings, INFORMATIONAL, WHERE)
    return Hqq()


def _read_settings(source: Source, name: str, shape: tuple[int, int]) -> tuple[int, int]:
    """(bits, group_size) of a layer. Raises FormatRefused for layers of another kind, TensorError for broken ones."""
    for part in present(source, name, INFORMATIONAL_PARTS):
        source.tensor(part)
    if _number(source, f"{name}.axis") not in (0, 1):
        raise TensorError(f"tensor '{name}.axis' is {_number(source, f'{name}.axis')}, expected 0 or 1")
    for part in OFF_PARTS:
        if f"{name}.{part}" in source and _number(source, f"{name}.{part}") != 0:
            raise FormatRefused(f"{name}.{part} is on: quantized scales and zero points of HQQ are not supported")
    if f"{name}.channel_wise" in source and _number(source, f"{name}.channel_wise") != 1:
        raise FormatRefused(f"{name}.channel_wise is off: one scale for a whole matrix is not supported")
    stored = tuple(source.take(f"{name}.shape", (2,), (torch.int32, torch.int64)).tolist())
    if stored != shape:
        raise TensorError(f"tensor '{name}.shape' holds {list(stored)}, expected {list(shape)}")
    nbits = _number(source, f"{name}.nbits")
    is_ternary = abs(nbits - TERNARY_NBITS) < 1e-3
    bits = 2 if is_ternary else int(nbits)
    if bits not in SLICES or not (is_ternary or nbits == bits):
        raise TensorError(f"tensor '{name}.nbits' is {nbits}, expected {', '.join(map(str, SLICES))} or 1.58")
    group_size = int(_number(source, f"{name}.group_size"))
    if not 1 <= group_size <= MAX_GROUP_SIZE or shape[0] * shape[1] % group_size:
        raise TensorError(f"tensor '{name}.group_size' is {group_size}, which does not divide {shape[0]} x {shape[1]}")
    return bits, group_size


def _number(source: Source, key: str) -> float:
    """A number that stands alone in a tensor."""
    value = float(source.take(key, (), NUMBERS))
    if not abs(value) < 1 << 31:
        raise TensorError(f"tensor {key!r} is {value}, which is no setting")
    return value


def _dequantize_axis_0(source: Source, name: str, bits: int, shape: tuple[int, int]) -> Tensor:
    """[group_size, groups] in the dtype of the scales, every step rounded as hqq's own dequantization rounds it."""
    codes = _codes(source, f"{name}.{MARK}", bits, shape)
    scale = take_scales(source, f"{name}.scale", (1, shape[1]))
    zero = take_scales(source, f"{name}.zero", (1, shape[1]))
    return codes.to(scale.dtype).sub_(zero.to(scale.dtype)).mul_(scale)


def _codes(source: Source, key: str, bits: int, shape: tuple[int, int]) -> Tensor:
    """The codes [rows, columns] uint8: [groups, group_size], or of axis 0 the other way round."""
    num_rows, num_columns = shape
    slices = SLICES[bits]
    if bits != 3 and num_rows % slices:
        raise TensorError(f"tensor {key!r}: {num_rows} rows do not fill bytes of {slices} codes of {bits} bits")
    rows = -(-num_rows // slices)
    word = torch.int32 if bits == 3 else torch.uint8
    itemsize = source.dtype(key).itemsize
    columns = num_columns * word.itemsize // itemsize
    if columns * itemsize != num_columns * word.itemsize:
        raise TensorError(f"tensor {key!r} has dtype {source.dtype(key)}, which {num_columns} codes do not fill")
    stored = source.take(key, (rows, columns), (word, *FLOATS)).contiguous().view(word)  # [rows, columns]
    if slices == 1:
        if bits < 8 and bool((stored >> bits).any()):
            raise TensorError(f"tensor {key!r} holds codes beyond {bits} bits")
        return stored
    mask = (1 << bits) - 1
    parts = [((stored >> (bits * (slices - 1 - i))) & mask).to(torch.uint8) for i in range(slices)]  # highest first
    return torch.cat(parts)[:num_rows]
