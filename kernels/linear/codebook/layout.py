"""Canonical weights of the codebook family (AQLM, QuIP#, PCDVQ): d neighbouring channels are one vector of a table.

    w[n, k] = book[code[n, k // d], k % d] * scale[n, k // G]

Residual codebooks are several terms, each with a book of its own. A book may be shared by all layers: it is one tensor.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

VECTOR_SIZES = (4, 8)
MAX_CODEBOOK_BITS = 16
CODE_DTYPES = (torch.uint8, torch.int16)
BOOK_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class CodebookWeights:
    """One matrix [N, K] of vectors of d channels. Raises ValueError, naming the field, when sizes disagree.

    Codes of 16 bits are stored as int16: code v stands for v modulo 65,536.
    """

    in_features: int  # K, a multiple of d
    group_size: int  # G, a multiple of d; the last group may be shorter
    codes: Tensor  # [N, K / d] uint8 or int16
    book: Tensor  # [num_vectors, d] float16, bfloat16 or float32
    scales: Tensor  # [N, ceil(K / G)] likewise

    def __post_init__(self) -> None:
        for name, tensor, dtypes in (
            ("codes", self.codes, CODE_DTYPES),
            ("book", self.book, BOOK_DTYPES),
            ("scales", self.scales, BOOK_DTYPES),
        ):
            if tensor.ndim != 2 or tensor.dtype not in dtypes:
                raise ValueError(f"{name} must be a matrix of one of {dtypes}, found {tensor.ndim}-D {tensor.dtype}")
        if self.vector_size not in VECTOR_SIZES:
            raise ValueError(f"book has vectors of {self.vector_size} values, expected one of {VECTOR_SIZES}")
        if not 1 <= self.book.shape[0] <= 2**self.bits:
            raise ValueError(f"book has {self.book.shape[0]} vectors, {self.codes.dtype} names at most {2**self.bits}")
        if self.in_features % self.vector_size or self.group_size < 1 or self.group_size % self.vector_size:
            raise ValueError(
                f"{self.in_features} channels in groups of {self.group_size} are not whole vectors "
                f"of {self.vector_size}"
            )
        for name, tensor, width in (
            ("codes", self.codes, self.in_features // self.vector_size),
            ("scales", self.scales, -(-self.in_features // self.group_size)),
        ):
            if tuple(tensor.shape) != (self.codes.shape[0], width):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {(self.codes.shape[0], width)}")
        if self.book.shape[0] < 2**self.bits and self.codes.numel() and (highest := self._highest_code()) is not None:
            raise ValueError(f"codes reach {highest}, the book has vectors 0..{self.book.shape[0] - 1}")

    @property
    def family(self) -> str:
        return "codebook"

    @property
    def vector_size(self) -> int:
        return self.book.shape[1]

    @property
    def bits(self) -> int:
        """Of one code, which stands for d weights."""
        return 8 * self.codes.element_size()

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.codes, self.book, self.scales))

    def describe(self) -> str:
        return f"{self.book.shape[0]} vectors of {self.vector_size}"

    def dequantize(self) -> Tensor:
        """Return the defining matrix, [N, K] float32."""
        return self.dequantize_rows(0, self.out_features)

    def dequantize_rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of the defining matrix, [stop - start, K] float32, so that callers bound their memory."""
        codes = self.codes[start:stop].int() & (2**self.bits - 1)  # [rows, K / d]
        vectors = self.book[codes].float().flatten(1)  # [rows, K]
        if self.scales.shape[1] == 1:
            return vectors * self.scales[start:stop].float()
        spread = self.scales[start:stop].float().repeat_interleave(self.group_size, dim=1)
        return vectors * spread[:, : self.in_features]

    def _highest_code(self) -> int | None:
        """A code past the end of the book, or None. A negative int16 stands for 32,768 and more."""
        low, high = torch.aminmax(self.codes)
        highest = int(high) if int(low) >= 0 else int(low) % 2**self.bits
        return highest if highest >= self.book.shape[0] else None
