"""The tensors of a layer in AWQ's layouts, of which AutoRound writes the first; w = scales * (q - z), 4 bits.

gemm       qweight  [in, out / 8]       int32, packed along the outputs, in an order of its own
           qzeros   [groups, out / 8]   int32, packed the same way; no offset
           scales   [groups, out]       float16

gemv       qweight  [out, in / 8]       int32, packed along the inputs, lowest bits first
           qzeros   [out, width]        int32, packed along the groups
           scales   [out, 8 * width]    float16; groups past the last are padding

gemv_fast  qweight  [out / 4, in]       int16, four outputs to a word, 64 inputs after 64, each 32 of them shuffled
           qzeros   [8 * width, out]    float16, -z * scales as rounded by the tool, which adds them
           scales   [8 * width, out]    float16

width is ceil(groups / 8), made a multiple of 128 / group_size where groups are smaller than 128.
"""

import torch
from torch import Tensor

from engine.checkpoint.codes import words_to_stream
from engine.checkpoint.errors import TensorError
from engine.checkpoint.linear import read_bias, take_scales
from engine.checkpoint.source import Source
from kernels.linear.affine.layout import AffineWeights
from kernels.linear.bitstream import pack_codes, unpack_codes
from kernels.linear.weights import LinearWeights

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # gemm: field of a word -> output
PER_WORD = 8
INTERLEAVED = 4  # gemv_fast: outputs that share a word
STRIDE = 64  # gemv_fast: inputs of one output that stand together
SHUFFLED = 32  # gemv_fast: inputs that are shuffled among themselves
ROWS_AT_ONCE = 1 << 9  # unpacked at once, to bound the memory


def read_gemm(source: Source, name: str, shape: tuple[int, int], bias: bool, group_size: int) -> LinearWeights:
    """The layer `name` in the layout "gemm"; shape is (out_features, in_features). Raises TensorError."""
    out_features, in_features = shape
    _check_divides(name, "outputs", out_features, PER_WORD)
    group_size, num_groups = _groups(in_features, group_size)
    words = out_features // PER_WORD
    qweight = source.take(f"{name}.qweight", (in_features, words), (torch.int32,))
    qzeros = source.take(f"{name}.qzeros", (num_groups, words), (torch.int32,))
    scales = take_scales(source, f"{name}.scales", (num_groups, out_features))
    weights = AffineWeights(
        bits=BITS,
        in_features=in_features,
        group_size=group_size,
        codes=_gemm_codes(qweight),  # [out, in / 2]
        scales=scales.t().contiguous(),  # [out, groups]
        zeros=_gemm_zeros(qzeros),  # [out, groups]
    )
    return LinearWeights((weights,), bias=read_bias(source, name, out_features, bias))


def read_gemv(source: Source, name: str, shape: tuple[int, int], bias: bool, group_size: int) -> LinearWeights:
    """The layer `name` in the layout "gemv"; shape is (out_features, in_features). Raises TensorError."""
    out_features, in_features = shape
    _check_divides(name, "inputs", in_features, PER_WORD)
    group_size, num_groups = _groups(in_features, group_size)
    width = _padded_words(num_groups, group_size)
    qweight = source.take(f"{name}.qweight", (out_features, in_features // PER_WORD), (torch.int32,))
    qzeros = source.take(f"{name}.qzeros", (out_features, width), (torch.int32,))
    scales = take_scales(source, f"{name}.scales", (out_features, PER_WORD * width))
    weights = AffineWeights(
        bits=BITS,
        in_features=in_features,
        group_size=group_size,
        codes=words_to_stream(qweight, BITS, in_features),  # [out, in / 2]
        scales=scales[:, :num_groups].contiguous(),  # [out, groups]
        zeros=unpack_codes(words_to_stream(qzeros, BITS, num_groups), BITS, num_groups),  # [out, groups]
    )
    return LinearWeights((weights,), bias=read_bias(source, name, out_features, bias))


def read_gemv_fast(source: Source, name: str, shape: tuple[int, int], bias: bool, group_size: int) -> LinearWeights:
    """The layer `name` in the layout "gemv_fast"; shape is (out_features, in_features). Raises TensorError."""
    out_features, in_features = shape
    _check_divides(name, "outputs", out_features, INTERLEAVED)
    _check_divides(name, "inputs", in_features, STRIDE)
    group_size, num_groups = _groups(in_features, group_size)
    stored = (PER_WORD * _padded_words(num_groups, group_size), out_features)
    qweight = source.take(f"{name}.qweight", (out_features // INTERLEAVED, in_features), (torch.int16,))
    scales = take_scales(source, f"{name}.scales", stored)
    offsets = take_scales(source, f"{name}.qzeros", stored)
    weights = AffineWeights(
        bits=BITS,
        in_features=in_features,
        group_size=group_size,
        codes=torch.cat([_fast_codes(rows) for rows in torch.split(qweight, ROWS_AT_ONCE)]),  # [out, in / 2]
        scales=scales[:num_groups].t().contiguous(),  # [out, groups]
        zeros=torch.zeros(1, 1, dtype=torch.uint8).expand(out_features, num_groups),
        offsets=offsets[:num_groups].t().contiguous(),  # [out, groups]
    )
    return LinearWeights((weights,), bias=read_bias(source, name, out_features, bias))


def _check_divides(name: str, what: str, count: int, unit: int) -> None:
    if count % unit:
        raise TensorError(f"{name} has {count} {what}, but AWQ packs {unit} together")


def _groups(in_features: int, group_size: int) -> tuple[int, int]:
    """Their size, where -1 means the whole row, and their number."""
    size = in_features if group_size == -1 else min(group_size, in_features)
    return size, -(-in_features // size)


def _padded_words(num_groups: int, group_size: int) -> int:
    unit = max(1, 128 // group_size)
    return -(-num_groups // (PER_WORD * unit)) * unit


def _gemm_codes(qweight: Tensor) -> Tensor:
    """[in, words] int32 -> [out, ceil(in / 2)] uint8: the bytes of two input channels are merged nibble by nibble."""
    rows = torch.nn.functional.pad(qweight.contiguous().view(torch.uint8), (0, 0, 0, qweight.shape[0] % 2))
    even, odd = rows[0::2], rows[1::2]  # [in / 2, 4 * words], two outputs in a byte
    low, high = (even & 0xF) | (odd << 4), (even >> 4) | (odd & 0xF0)  # [in / 2, 4 * words], two inputs in a byte
    return _outputs_first(low, high)


def _gemm_zeros(qzeros: Tensor) -> Tensor:
    """[groups, words] int32 -> [out, groups] uint8."""
    packed = qzeros.contiguous().view(torch.uint8)  # [groups, 4 * words]
    return _outputs_first(packed & 0xF, packed >> 4)


def _outputs_first(low: Tensor, high: Tensor) -> Tensor:
    """Fields 0, 2, 4, 6 of every word in `low`, 1, 3, 5, 7 in `high`, [rows, 4 * words] each -> [out, rows]."""
    fields = torch.stack((low, high), dim=-1).view(low.shape[0], -1, PER_WORD)  # [rows, words, 8]
    field_of_output = torch.tensor(ORDER).argsort()
    return fields[..., field_of_output].flatten(1).t().contiguous()


def _fast_codes(qweight: Tensor) -> Tensor:
    """[out / 4, in] int16 -> [out, in / 2] uint8."""
    num_words, in_features = qweight.shape
    nibbles = unpack_codes(qweight.contiguous().view(torch.uint8), BITS, INTERLEAVED * in_features)
    runs = nibbles.view(num_words, -1, INTERLEAVED, STRIDE)  # [out / 4, in / 64, 4, 64]
    shuffled = runs.transpose(1, 2).reshape(INTERLEAVED * num_words, -1, SHUFFLED)  # [out, in / 32, 32]
    place = _shuffle().argsort()  # of input i within its 32
    return pack_codes(shuffled[..., place].flatten(1), BITS)


def _shuffle() -> Tensor:
    """Which of 32 inputs stands where: pairs of four rows of eight dealt in turn, then even ones before odd ones."""
    dealt = torch.arange(SHUFFLED).view(4, 4, 2).transpose(0, 1)
    return dealt.reshape(4, 4, 2).transpose(1, 2).flatten()
