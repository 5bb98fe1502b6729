"""The layouts of compressed-tensors checkpoints: the tensors of one linear layer -> its canonical term.

pack-quantized          weight_packed int32, codes along the row, lowest bits first; value + 2^(bits - 1)
int-quantized           weight int8
float-quantized         weight e4m3
nvfp4-pack-quantized    weight_packed uint8, two e2m1 codes a byte, the first channel low; w = table[code] * s / G
mxfp4-pack-quantized    likewise, scales powers of two
mxfp8-quantized         weight e4m3, scales powers of two

    weight_scale       [out, groups], [out, 1], [1], or of blocks; s of 4-bit floats is e4m3 or a biased exponent
    weight_zero_point  [out, groups] int8, or packed along the outputs as int32; w = scale * (q - z)
    weight_g_idx       [in] int32, only with actorder "group"; -1 means unset
    weight_shape       [2] int64, (out, in), beside packed integers

Widths that do not divide 32 are packed in two ways: newer releases (0.19) let codes straddle words, older ones leave
the top bits of a word unused. The number of words tells which.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from engine.checkpoint.codes import input_order, num_words, reorder_codes, words_to_stream
from engine.checkpoint.errors import TensorError
from engine.checkpoint.linear import take_scalar, take_scales
from engine.checkpoint.source import Source
from kernels.linear.affine.layout import AffineWeights
from kernels.linear.bitstream import pack_codes, unpack_codes
from kernels.linear.fp8.layout import Fp8Weights
from kernels.linear.int8.layout import Int8Weights
from kernels.linear.rounding import Rounding
from kernels.linear.table.layout import TableWeights
from kernels.linear.table.tables import E2M1
from kernels.linear.transforms import Permutation, Transform
from kernels.linear.weights import Term

INTEGERS = (torch.int32, torch.int64)
WORD_BITS = 32
NOT_A_SCALE = 255  # the one exponent of e8m0 that stands for NaN


@dataclass(frozen=True)
class Scheme:
    """How the weights of a config group are quantized."""

    bits: int
    is_float: bool
    symmetric: bool
    strategy: str  # "tensor", "channel", "group" or "block"
    group_size: int | None  # of the strategy "group"
    block: tuple[int, int] | None  # rows and columns, of the strategy "block"

    def groups(self, in_features: int) -> tuple[int, int]:
        """The group size for rows of in_features channels, and the number of groups."""
        size = min(self.group_size or in_features, in_features)
        return size, -(-in_features // size)

    def describe(self) -> str:
        kind = f"{'fp' if self.is_float else ''}{self.bits}{'' if self.is_float else '-bit'}"
        if self.block is not None:
            return f"{kind} {self.block[0]}x{self.block[1]}"
        return f"{kind} g{self.group_size}" if self.group_size else f"{kind} per {self.strategy}"


@dataclass(frozen=True)
class Layer:
    """What a layout is asked to read."""

    source: Source
    name: str
    shape: tuple[int, int]  # out_features, in_features
    scheme: Scheme
    rounding: Rounding | None  # of activations

    def key(self, part: str) -> str:
        return f"{self.name}.{part}"


@dataclass(frozen=True)
class Read:
    """The term, and what is done to its input first."""

    term: Term
    pre: tuple[Transform, ...]


def read_packed(layer: Layer) -> Read:
    """Integers of 2 to 8 bits, and the order of the input channels."""
    bits, (out_features, in_features) = layer.scheme.bits, layer.shape
    group_size, num_groups = layer.scheme.groups(in_features)
    stored = tuple(layer.source.take(layer.key("weight_shape"), (2,), INTEGERS).tolist())
    if stored != layer.shape:
        raise TensorError(f"tensor {layer.key('weight_shape')!r} holds {list(stored)}, expected {list(layer.shape)}")
    key = layer.key("weight_packed")
    count = _count_words(layer.source.shape(key)[-1], in_features, bits, key)
    words = layer.source.take(key, (out_features, count), (torch.int32,))
    codes = _stream(words, bits, in_features)
    order = _order(layer.source, layer.key("weight_g_idx"), in_features, group_size)  # [in] or None
    if order is not None:
        codes = reorder_codes(codes, bits, order)
    zeros = _zeros(layer, (out_features, num_groups))
    weights = AffineWeights(bits, in_features, group_size, codes, _scales(layer), zeros)
    permutation = () if order is None else (Permutation(order),)
    return Read(weights, _rounded(layer) + permutation)


def read_int(layer: Layer) -> Read:
    """Integers in a byte each; with integer activations they are multiplied as integers."""
    bits, shape = layer.scheme.bits, layer.shape
    group_size, num_groups = layer.scheme.groups(shape[1])
    weight = layer.source.take(layer.key("weight"), shape, (torch.int8,))
    zeros = _signed_zeros(layer, (shape[0], num_groups))
    if layer.rounding is not None and layer.rounding.grid == "int":
        try:
            return Read(Int8Weights(bits, group_size, weight, _scales(layer), zeros, layer.rounding), ())
        except ValueError as error:
            raise TensorError(f"tensor {layer.key('weight')!r}: {error}") from error
    codes = (weight.view(torch.uint8) + 128).contiguous()  # from -128..127 to 0..255, modulo 256
    unsigned = torch.tensor(128, dtype=torch.uint8).expand(shape[0], num_groups)
    if zeros is not None:
        unsigned = zeros.contiguous().view(torch.uint8) + 128
    return Read(AffineWeights(8, shape[1], group_size, codes, _scales(layer), unsigned), _rounded(layer))


def read_float(layer: Layer) -> Read:
    """e4m3 with a scale for the tensor, a row, a block, or a group of channels in a row."""
    weight = layer.source.take(layer.key("weight"), layer.shape, (torch.float8_e4m3fn,))
    out_features, in_features = layer.shape
    if layer.scheme.block is not None:
        rows, columns = layer.scheme.block
        shape = (-(-out_features // rows), -(-in_features // columns))
        scales = take_scales(layer.source, layer.key("weight_scale"), shape)
        return _fp8(layer, weight, scales, (rows, columns))
    if layer.scheme.strategy == "tensor":
        return _fp8(layer, weight, take_scalar(layer.source, layer.key("weight_scale")).view(1, 1), layer.shape)
    return _fp8(layer, weight, _scales(layer), (1, layer.scheme.groups(in_features)[0]))


def read_mxfp8(layer: Layer) -> Read:
    weight = layer.source.take(layer.key("weight"), layer.shape, (torch.float8_e4m3fn,))
    return _fp8(layer, weight, _exponents(layer), (1, layer.scheme.groups(layer.shape[1])[0]))


def read_nvfp4(layer: Layer) -> Read:
    """The global scale divides."""
    shape = (layer.shape[0], layer.scheme.groups(layer.shape[1])[1])
    scales = take_scales(layer.source, layer.key("weight_scale"), shape, (torch.float8_e4m3fn,))
    divisor = take_scalar(layer.source, layer.key("weight_global_scale"))
    return Read(_fp4(layer, scales, 1 / float(divisor)), _rounded(layer))


def read_mxfp4(layer: Layer) -> Read:
    return Read(_fp4(layer, _exponents(layer), 1.0), _rounded(layer))


READERS: Mapping[str, Callable[[Layer], Read]] = MappingProxyType(
    {
        "pack-quantized": read_packed,
        "int-quantized": read_int,
        "float-quantized": read_float,
        "nvfp4-pack-quantized": read_nvfp4,
        "mxfp4-pack-quantized": read_mxfp4,
        "mxfp8-quantized": read_mxfp8,
    }
)


def _rounded(layer: Layer) -> tuple[Transform, ...]:
    return () if layer.rounding is None else (layer.rounding,)


def _fp8(layer: Layer, weight: Tensor, scales: Tensor, block: tuple[int, int]) -> Read:
    try:
        return Read(Fp8Weights(weight, scales, block), _rounded(layer))
    except ValueError as error:
        raise TensorError(f"tensor {layer.key('weight')!r}: {error}") from error


def _fp4(layer: Layer, scales: Tensor, factor: float) -> TableWeights:
    out_features, in_features = layer.shape
    codes = layer.source.take(layer.key("weight_packed"), (out_features, -(-in_features // 2)), (torch.uint8,))
    return TableWeights(4, in_features, layer.scheme.groups(in_features)[0], codes, scales, E2M1, factor)


def _scales(layer: Layer) -> Tensor:
    """[out, groups], whatever the strategy stores."""
    wanted = (layer.shape[0], layer.scheme.groups(layer.shape[1])[1])
    stored = (1,) if layer.scheme.strategy == "tensor" else wanted
    return take_scales(layer.source, layer.key("weight_scale"), stored).expand(wanted).contiguous()


def _exponents(layer: Layer) -> Tensor:
    """Powers of two, [out, groups], stored as their exponents plus 127."""
    key = layer.key("weight_scale")
    shape = (layer.shape[0], layer.scheme.groups(layer.shape[1])[1])
    stored = layer.source.take(key, shape, (torch.uint8, torch.float8_e8m0fnu)).view(torch.uint8)
    if bool((stored == NOT_A_SCALE).any()):
        raise TensorError(f"tensor {key!r} holds scales that are NaN")
    return stored.view(torch.float8_e8m0fnu)


def _count_words(found: int, num_codes: int, bits: int, key: str) -> int:
    """How many words rows of codes take, given how many were found: straddling or padded. Raises TensorError."""
    straddling, padded = num_words(num_codes, bits), -(-num_codes // (WORD_BITS // bits))
    if straddling == padded > 1 and WORD_BITS % bits:
        raise TensorError(
            f"tensor {key!r}: {num_codes} codes of {bits} bits take {padded} words in older releases of "
            "compressed-tensors and in newer ones, in different places, and the file does not say which it is"
        )
    return padded if found == padded else straddling


def _stream(words: Tensor, bits: int, num_codes: int) -> Tensor:
    """[rows, words] int32 -> [rows, ceil(num_codes * bits / 8)] uint8, codes without a gap."""
    if words.shape[1] == num_words(num_codes, bits):
        return words_to_stream(words, bits, num_codes)
    shifts = torch.arange(0, WORD_BITS - bits + 1, bits, dtype=torch.int32)
    codes = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)  # [rows, words, codes of a word]
    return pack_codes(codes.to(torch.uint8).flatten(1)[:, :num_codes], bits)


def _order(source: Source, key: str, in_features: int, group_size: int) -> Tensor | None:
    if key not in source:
        return None
    g_idx = source.take(key, (in_features,), INTEGERS)
    return None if (g_idx == -1).any() else input_order(g_idx, group_size, key)


def _zeros(layer: Layer, shape: tuple[int, int]) -> Tensor:
    """Unsigned zero points, [out, groups] uint8; the middle of the range when the checkpoint stores none."""
    bits, key = layer.scheme.bits, layer.key("weight_zero_point")
    if key in layer.source and layer.source.dtype(key) == torch.int32:
        out_features, num_groups = shape
        count = _count_words(layer.source.shape(key)[0], out_features, bits, key)
        words = layer.source.take(key, (count, num_groups), (torch.int32,)).t()  # packed along the outputs
        return unpack_codes(_stream(words, bits, out_features), bits, out_features).t().contiguous()
    signed, middle = _signed_zeros(layer, shape), 1 << (bits - 1)
    if signed is None:
        return torch.full((1, 1), middle, dtype=torch.uint8).expand(shape)
    return (signed.short() + middle).to(torch.uint8).expand(shape)


def _signed_zeros(layer: Layer, shape: tuple[int, int]) -> Tensor | None:
    """Signed zero points, [out, groups] int8; None where the checkpoint stores none, and needs none."""
    key, middle = layer.key("weight_zero_point"), 1 << (layer.scheme.bits - 1)
    if layer.scheme.symmetric and key not in layer.source:
        return None
    stored = (1,) if layer.scheme.strategy == "tensor" else shape
    signed = layer.source.take(key, stored, (torch.int8,))
    if bool(((signed.short() < -middle) | (signed.short() >= middle)).any()):
        raise TensorError(f"tensor {key!r} holds zero points beyond the {layer.scheme.bits}-bit range")
    return signed.expand(shape).contiguous()
