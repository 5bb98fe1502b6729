"""Canonical weights of the table family (NF4, FP4, MXFP4, NVFP4, ternary, binary).

    w[n, k] = table[code[n, k]] * (scale[n, k // G] * factor)

The codes of one row are a little-endian bit stream (kernels/linear/bitstream.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.linear.bitstream import unpack_codes

MAX_TABLE_BITS = 4
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e8m0fnu)


@dataclass(frozen=True)
class TableWeights:
    """One matrix [N, K] in groups of G input channels. Raises ValueError, naming the field, when sizes disagree.

    Scales of one byte carry their meaning in their dtype: float8_e8m0fnu is the power of two of MXFP4, float8_e4m3fn
    the small float of NVFP4. Bits of the last byte of a row past the last code are zero.
    """

    bits: int  # 1..4
    in_features: int  # K
    group_size: int  # G; the last group may be shorter
    codes: Tensor  # [N, ceil(K * bits / 8)] uint8, little-endian bit stream along K
    scales: Tensor  # [N, ceil(K / G)] of a dtype in SCALE_DTYPES
    table: tuple[float, ...]  # at most 2**bits entries
    factor: float = 1.0  # of every scale; NVFP4 stores one for each matrix

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MAX_TABLE_BITS:
            raise ValueError(f"bits must be 1..{MAX_TABLE_BITS}, found {self.bits}")
        if self.group_size < 1:
            raise ValueError(f"group_size must be positive, found {self.group_size}")
        if not 1 <= len(self.table) <= 2**self.bits:
            raise ValueError(f"table has {len(self.table)} entries, expected 1..{2**self.bits} for {self.bits} bits")
        for name, tensor, width in (
            ("codes", self.codes, -(-self.in_features * self.bits // 8)),
            ("scales", self.scales, self.num_groups),
        ):
            if tuple(tensor.shape) != (self.codes.shape[0], width):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {(self.codes.shape[0], width)}")
        if self.codes.dtype != torch.uint8:
            raise ValueError(f"codes must be uint8, found {self.codes.dtype}")
        if self.scales.dtype not in SCALE_DTYPES:
            raise ValueError(f"scales must be float32, float16, bfloat16, e4m3 or e8m0, found {self.scales.dtype}")
        highest = self._highest_code()
        if highest >= len(self.table):
            raise ValueError(f"codes reach {highest}, the table has entries 0..{len(self.table) - 1}")

    @property
    def family(self) -> str:
        return "table"

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def num_groups(self) -> int:
        return -(-self.in_features // self.group_size)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.codes, self.scales))

    def describe(self) -> str:
        return f"{len(self.table)}-entry g{self.group_size}"

    def dequantize(self) -> Tensor:
        """Return the defining matrix, [N, K] float32."""
        return self.dequantize_rows(0, self.out_features)

    def dequantize_rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of the defining matrix, [stop - start, K] float32, so that callers bound their memory."""
        codes = unpack_codes(self.codes[start:stop], self.bits, self.in_features)  # [rows, K] uint8
        table = torch.tensor(self.table, dtype=torch.float32, device=codes.device)
        # The factor in double: a format that divides by its global scale gets the same bits from the reciprocal.
        scales = (self.scales[start:stop].double() * self.factor).float()  # [rows, groups]
        spread = scales.repeat_interleave(self.group_size, dim=1)[:, : self.in_features]
        return table[codes.int()] * spread

    def _highest_code(self) -> int:
        """0 without looking where every code has an entry."""
        if len(self.table) == 2**self.bits:
            return 0
        step = max(1, (1 << 20) // self.in_features)  # rows at a time bound the memory
        highest = 0
        for start in range(0, self.out_features, step):
            codes = unpack_codes(self.codes[start : start + step], self.bits, self.in_features)
            highest = max(highest, int(codes.max()) if codes.numel() else 0)
        return highest
