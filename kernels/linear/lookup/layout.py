"""Canonical weights of the lookup family: what is recovered from rounded weights of no known scheme.

    w[n, k] = table[n, k // G, code[n, k]]

The codes of one row are a little-endian bit stream (kernels/linear/bitstream.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.linear.bitstream import unpack_codes

MAX_LOOKUP_BITS = 4
TABLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LookupWeights:
    """One matrix [N, K] in groups of G input channels. Raises ValueError, naming the field, when sizes disagree."""

    bits: int  # 1..4
    in_features: int  # K
    group_size: int  # G; the last group may be shorter
    codes: Tensor  # [N, ceil(K * bits / 8)] uint8, little-endian bit stream along K
    tables: Tensor  # [N, ceil(K / G), 2**bits] float16, bfloat16 or float32

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MAX_LOOKUP_BITS:
            raise ValueError(f"bits must be 1..{MAX_LOOKUP_BITS}, found {self.bits}")
        if self.group_size < 1:
            raise ValueError(f"group_size must be positive, found {self.group_size}")
        width = -(-self.in_features * self.bits // 8)
        if self.codes.ndim != 2 or self.codes.shape[1] != width:
            raise ValueError(f"codes has shape {tuple(self.codes.shape)}, expected (rows, {width})")
        expected = (self.codes.shape[0], self.num_groups, 2**self.bits)
        if tuple(self.tables.shape) != expected:
            raise ValueError(f"tables has shape {tuple(self.tables.shape)}, expected {expected}")
        if self.codes.dtype != torch.uint8:
            raise ValueError(f"codes must be uint8, found {self.codes.dtype}")
        if self.tables.dtype not in TABLE_DTYPES:
            raise ValueError(f"tables must be float32, float16 or bfloat16, found {self.tables.dtype}")

    @property
    def family(self) -> str:
        return "lookup"

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def num_groups(self) -> int:
        return -(-self.in_features // self.group_size)

    @property
    def num_bytes(self) -> int:
        return self.codes.numel() + self.tables.numel() * self.tables.element_size()

    def describe(self) -> str:
        return f"{2**self.bits}-value tables g{self.group_size}"

    def dequantize(self) -> Tensor:
        """Return the defining matrix, [N, K] float32."""
        return self.dequantize_rows(0, self.out_features)

    def dequantize_rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of the defining matrix, [stop - start, K] float32, so that callers bound their memory."""
        codes = unpack_codes(self.codes[start:stop], self.bits, self.in_features)  # [rows, K] uint8
        group = torch.arange(self.in_features, device=codes.device) // self.group_size  # [K]
        entry = group * 2**self.bits + codes  # [rows, K] into a row's tables one after the other
        return self.tables[start:stop].flatten(1).gather(1, entry).float()
