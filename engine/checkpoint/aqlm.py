"""AQLM checkpoints (arXiv:2401.06118): every vector of input channels is a sum of entries of learned codebooks.

    w[n, g d + j] = scales[n] * sum_c codebooks[c, codes[n, g, c] mod 2^b, 0, j]

    codes       [out, in / d, num_codebooks]    int8 or int16, the upper half of the codes negative
    codebooks   [num_codebooks, 2^b, 1, d]      float16, bfloat16 or float32
    scales      [out, 1, 1, 1]                  likewise

The definition is the aqlm library's own dequantization, which multiplies the sum: several codebooks are terms, and the
scale is a transform of the output. Vectors that span several outputs (out_group_size above 1) are not supported.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from engine.checkpoint.errors import FormatRefused, TensorError
from engine.checkpoint.linear import is_packed, read_bias, read_dense, read_settings
from engine.checkpoint.source import FLOATS, Source
from kernels.linear.codebook.layout import CodebookWeights
from kernels.linear.transforms import Diagonal
from kernels.linear.weights import LinearWeights

WHERE = "AQLM config"
INFORMATIONAL = frozenset({"quant_method", "linear_weights_not_to_quantize"})  # codes or weight: the tensors tell


class _Settings(msgspec.Struct, frozen=True):
    in_group_size: Literal[4, 8] = 8
    out_group_size: int = 1
    num_codebooks: int = 1
    nbits_per_codebook: int = 16


@dataclass(frozen=True)
class Aqlm:
    """The reader of AQLM checkpoints."""

    settings: _Settings
    name: str = "aqlm"

    def describe(self) -> str:
        return f"AQLM {self.settings.num_codebooks}x{self.settings.nbits_per_codebook} g{self.settings.in_group_size}"

    def linear(self, source: Source, name: str, shape: tuple[int, int], bias: bool) -> LinearWeights:
        if not is_packed(source, name, "codes"):
            return read_dense(source, name, shape, bias)
        num_books, bits = self.settings.num_codebooks, self.settings.nbits_per_codebook
        size, (out_features, in_features) = self.settings.in_group_size, shape
        stored = (torch.int8,) if bits <= 8 else (torch.int16,)
        codes = source.take(f"{name}.codes", (out_features, in_features // size, num_books), stored)
        books = source.take(f"{name}.codebooks", (num_books, 2**bits, 1, size), FLOATS)
        scales = source.take(f"{name}.scales", (out_features, 1, 1, 1), FLOATS).view(out_features, 1)
        if not bool(books.isfinite().all() and scales.isfinite().all()):
            raise TensorError(f"the codebooks or scales of {name!r} hold a value that is not finite")
        ones = torch.ones(out_features, 1, dtype=torch.float16)
        try:
            terms = tuple(
                CodebookWeights(
                    in_features,
                    in_features,
                    _unsigned(codes[..., c], bits),
                    books[c, :, 0],
                    scales if num_books == 1 else ones,
                )
                for c in range(num_books)
            )
        except ValueError as error:
            raise TensorError(f"the tensors of {name!r} make no weights: {error}") from error
        post = () if num_books == 1 else (Diagonal(scales.flatten()),)
        return LinearWeights(terms, (), read_bias(source, name, out_features, bias), post)


def read_config(config: Mapping[str, Any]) -> Aqlm:
    """Build the reader from a quantization config. Raises FormatRefused naming the setting that is not supported."""
    settings = read_settings(config, _Settings, INFORMATIONAL, WHERE)
    if settings.out_group_size != 1:
        raise FormatRefused(
            f"{WHERE}: out_group_size {settings.out_group_size} is not supported, only 1 is: vectors of inputs"
        )
    if not 1 <= settings.nbits_per_codebook <= 16 or settings.num_codebooks < 1:
        raise FormatRefused(
            f"{WHERE}: {settings.num_codebooks} codebooks of {settings.nbits_per_codebook} bits are not supported, "
            "only one or more of 1 to 16 bits are"
        )
    return Aqlm(settings)


def _unsigned(codes: Tensor, bits: int) -> Tensor:
    """[out, in / d] int8 or int16 -> uint8, or int16 whose bits are the code."""
    masked = codes.int() & (2**bits - 1)
    return masked.to(torch.uint8) if bits <= 8 else torch.where(masked >= 32768, masked - 65536, masked).to(torch.int16)
