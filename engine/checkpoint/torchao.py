"""torchao checkpoints in safetensors, as transformers saves them: integer weights in the layouts that are plain.

A quantized weight is flattened to `_weight_qdata`, `_weight_scale` and `_weight_zero_point`; what they are stands as
JSON in the header of the file, under the weight's name.

    Int8Tensor                _qdata [out, in] int8         w = (q - zero_point) * scale
    IntxUnpackedToInt8Tensor  _qdata [out, in] int8         likewise; target_dtype int1 .. int8 says how many bits count
        _scale, _zero_point   [out / b0, in / b1]           blocks of block_size = [b0, b1]

    Int4Tensor                _qdata [out, in / 2] int8     w = q * scale + zero_point, -8 <= q <= 7, low nibble first
        _scale, _zero_point   [in / group, out]

Layouts made for one device are refused. Where torchao rounds activations as they come (act_quant_kwargs), they are
rounded here, or not, as for every other format. Pickled checkpoints, as older releases write them, are never opened.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import msgspec
import torch
from torch import Tensor

from engine.checkpoint.errors import FormatRefused, TensorError
from engine.checkpoint.linear import present, read_bias, read_dense, read_settings, take_scales
from engine.checkpoint.source import FLOATS, Source
from kernels.linear.affine.layout import AffineWeights
from kernels.linear.bitstream import pack_codes
from kernels.linear.weights import LinearWeights

WHERE = "torchao config"
PREFIX = "_weight_"
QDATA, SCALE, ZERO = f"{PREFIX}qdata", f"{PREFIX}scale", f"{PREFIX}zero_point"
UNSUPPORTED_PARTS = ("act_pre_scale", "act_quant_scale", "act_quant_zero_point", "per_tensor_scale", "scale_and_zero")
# Which layers were quantized and how stands beside each of them.
INFORMATIONAL = frozenset(
    {"modules_to_not_convert", "quant_method", "quant_type", "quant_type_kwargs", "untie_embedding_weights"}
)
MIDDLE = 8  # code of the weight 0 in Int4Tensor
BITS = MappingProxyType({f"int{bits}": bits for bits in range(1, 9)})


class _Settings(msgspec.Struct, frozen=True):
    include_input_output_embeddings: bool = False


class _Type(msgspec.Struct, frozen=True):
    """A torch.dtype, as torchao writes it."""

    name: str = msgspec.field(name="_data")


class _Attributes(msgspec.Struct, frozen=True):
    block_size: tuple[int, int]
    target_dtype: _Type | None = None
    activation_quantization: str | dict[str, Any] | None = None


class _Subclass(msgspec.Struct, frozen=True):
    """The JSON of one weight in a file's header."""

    kind: str = msgspec.field(name="_type")
    attributes: dict[str, Any] = msgspec.field(name="_data", default_factory=dict)
    parts: tuple[str, ...] = msgspec.field(name="_tensor_data_names", default=())


@dataclass(frozen=True)
class TorchAo:
    """The reader of torchao checkpoints."""

    name: str = "torchao"

    def describe(self) -> str:
        return "torchao"

    def linear(self, source: Source, name: str, shape: tuple[int, int], bias: bool) -> LinearWeights:
        if f"{name}.{QDATA}" not in source:
            return read_dense(source, name, shape, bias)
        for part in present(source, name, [f"{PREFIX}{part}" for part in UNSUPPORTED_PARTS]):
            raise FormatRefused(f"tensor {part!r}: static or scaled activations of torchao are not supported")
        kind, attributes = _description(source, name)
        reader = _READERS.get(kind)
        if reader is None:
            raise FormatRefused(
                f"{name} is a torchao {kind}, which is laid out for one device; supported are {', '.join(_READERS)}: "
                "quantize the model again with a plain packing format, or IntxWeightOnlyConfig"
            )
        weights = reader(source, name, shape, attributes)
        return LinearWeights((weights,), bias=read_bias(source, name, shape[0], bias))


def read_config(config: Mapping[str, Any]) -> TorchAo:
    """Build the reader from a quantization config. Raises FormatRefused naming the setting that is not supported."""
    settings = read_settings(config, _Settings, INFORMATIONAL, WHERE)
    if settings.include_input_output_embeddings:
        raise FormatRefused(f"{WHERE}: include_input_output_embeddings, a quantized embedding, is not supported")
    return TorchAo()


def _description(source: Source, name: str) -> tuple[str, _Attributes]:
    """The tensor subclass of a weight and its attributes, from the header of the file that holds its codes."""
    written = source.metadata(f"{name}.{QDATA}").get(f"{name}.weight")
    if written is None:
        raise TensorError(f"{source.folder}: the header of the file with {name}.{QDATA} does not say what it is")
    try:
        subclass = msgspec.json.decode(written.encode(), type=_Subclass)
        if subclass.kind not in _READERS:
            return subclass.kind, _Attributes((1, 1))
        attributes = msgspec.convert(subclass.attributes, _Attributes)
    except (msgspec.DecodeError, RecursionError) as error:  # DecodeError is also the base of ValidationError
        raise TensorError(f"{source.folder}: the header of {name}.weight is not torchao's: {error}") from error
    for part in subclass.parts:
        if f"{name}.{PREFIX}{part}" not in source:
            raise TensorError(
                f"{source.folder}: the checkpoint has no tensor {name}.{PREFIX}{part}, which its header lists"
            )
    return subclass.kind, attributes


def _integers(source: Source, name: str, shape: tuple[int, int], attributes: _Attributes) -> AffineWeights:
    """Codes of one byte each, of which the lowest bits count."""
    target = "int8" if attributes.target_dtype is None else attributes.target_dtype.name
    if target not in BITS:
        raise FormatRefused(f"{name}: torchao target_dtype {target!r} is not supported, only int1 to int8 are")
    bits, half = BITS[target], 1 << (BITS[target] - 1)
    rows, channels = _block_size(name, attributes, shape)
    signed = source.take(f"{name}.{QDATA}", shape, (torch.int8,))
    if bits < 8 and not bool(((signed >= -half) & (signed < half)).all()):
        raise TensorError(f"tensor '{name}.{QDATA}' holds codes beyond {target}")
    codes = signed.view(torch.uint8) ^ 128 if bits == 8 else (signed + half).view(torch.uint8)
    stored = (shape[0] // rows, shape[1] // channels)
    scales = take_scales(source, f"{name}.{SCALE}", stored)
    return AffineWeights(
        bits=bits,
        in_features=shape[1],
        group_size=channels,
        codes=pack_codes(codes, bits),  # [out, in * bits / 8]
        scales=scales.repeat_interleave(rows, dim=0),  # [out, groups]
        zeros=_zeros(source, f"{name}.{ZERO}", stored, half).repeat_interleave(rows, dim=0),
    )


def _zeros(source: Source, key: str, shape: tuple[int, int], half: int) -> Tensor:
    """Zero points of the unsigned codes, [blocks, groups]: uint8 where they fit, else float32."""
    if key not in source:
        return torch.full(shape, half, dtype=torch.uint8)
    stored = take_scales(source, key, shape, (torch.int8, torch.int32, *FLOATS))
    zeros = stored.float() + half
    fits = not stored.is_floating_point() and bool(((zeros >= 0) & (zeros <= 255)).all())
    return zeros.to(torch.uint8) if fits else zeros


def _int4(source: Source, name: str, shape: tuple[int, int], attributes: _Attributes) -> AffineWeights:
    """Two signed codes to a byte, and minima in place of zero points."""
    rows, group_size = _block_size(name, attributes, shape)
    if rows != 1 or shape[1] % 2:
        raise TensorError(f"{name}: an Int4Tensor of block_size {list(attributes.block_size)} for {list(shape)}")
    packed = source.take(f"{name}.{QDATA}", (shape[0], shape[1] // 2), (torch.int8, torch.uint8))
    stored = (shape[1] // group_size, shape[0])
    scales = take_scales(source, f"{name}.{SCALE}", stored).t().contiguous()  # [out, groups]
    zeros = take_scales(source, f"{name}.{ZERO}", stored).t()  # [out, groups]
    return AffineWeights(
        bits=4,
        in_features=shape[1],
        group_size=group_size,
        codes=packed.view(torch.uint8) ^ 0x88,  # q + 8
        scales=scales,
        zeros=torch.zeros(1, 1, dtype=torch.uint8).expand(scales.shape),
        offsets=zeros.float() - MIDDLE * scales.float(),
    )


def _block_size(name: str, attributes: _Attributes, shape: tuple[int, int]) -> tuple[int, int]:
    """(rows, channels) of a block, each of which divides the shape. -1 stands for all."""
    sizes = [size if block == -1 else block for block, size in zip(attributes.block_size, shape, strict=True)]
    if any(block < 1 or size % block for block, size in zip(sizes, shape, strict=True)):
        raise TensorError(f"{name}: blocks of {list(attributes.block_size)} do not divide {list(shape)}")
    return sizes[0], sizes[1]


_READERS = MappingProxyType({"Int8Tensor": _integers, "IntxUnpackedToInt8Tensor": _integers, "Int4Tensor": _int4})
