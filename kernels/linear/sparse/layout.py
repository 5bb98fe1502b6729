"""Canonical weights of the sparse family (outliers beside a dense term): rows of (column, value), CSR.

w[n, columns[i]] = values[i]   for starts[n] <= i < starts[n + 1],   0 elsewhere
"""

from dataclasses import dataclass

import torch
from torch import Tensor

VALUE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class SparseWeights:
    """One matrix [N, K] of few entries. Raises ValueError, naming the field, when they do not make a matrix."""

    in_features: int  # K
    starts: Tensor  # [N + 1] int32, entries before each row; the last is their number
    columns: Tensor  # [num_entries] int32, rising in each row
    values: Tensor  # [num_entries] float16, bfloat16 or float32

    def __post_init__(self) -> None:
        for name, tensor in (("starts", self.starts), ("columns", self.columns)):
            if tensor.ndim != 1 or tensor.dtype != torch.int32:
                raise ValueError(f"{name} must be a vector of int32, found {tensor.ndim}-D {tensor.dtype}")
        if self.values.dtype not in VALUE_DTYPES or self.values.shape != self.columns.shape:
            raise ValueError(
                f"values has shape {tuple(self.values.shape)} of {self.values.dtype}, expected floats, one for each of "
                f"{self.columns.shape[0]} columns"
            )
        counts = self.starts.diff()
        if self.starts.shape[0] < 1 or int(self.starts[0]) != 0 or bool((counts < 0).any()):
            raise ValueError("starts must begin with 0 and never fall")
        if int(self.starts[-1]) != self.columns.shape[0]:
            raise ValueError(f"starts ends with {int(self.starts[-1])}, there are {self.columns.shape[0]} columns")
        keys = self.rows() * self.in_features + self.columns  # rise when rows and columns do
        if bool(((self.columns < 0) | (self.columns >= self.in_features)).any()):
            raise ValueError(f"columns must lie in 0..{self.in_features - 1}")
        if bool((keys.diff() <= 0).any()):
            raise ValueError("columns must rise in each row")

    @property
    def family(self) -> str:
        return "sparse"

    @property
    def out_features(self) -> int:
        return self.starts.shape[0] - 1

    @property
    def bits(self) -> int:
        return 8 * self.values.element_size()

    @property
    def group_size(self) -> int:
        return self.in_features

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.starts, self.columns, self.values))

    def describe(self) -> str:
        return f"{self.values.shape[0]} sparse values"

    def rows(self) -> Tensor:
        """The row of every entry, [num_entries] int64."""
        return torch.arange(self.out_features, device=self.starts.device).repeat_interleave(self.starts.diff())

    def dequantize(self) -> Tensor:
        """Return the defining matrix, [N, K] float32."""
        return self.dequantize_rows(0, self.out_features)

    def dequantize_rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of the defining matrix, [stop - start, K] float32, so that callers bound their memory."""
        first, last = int(self.starts[start]), int(self.starts[stop])
        rows = torch.arange(stop - start, device=self.starts.device)
        row = rows.repeat_interleave(self.starts[start : stop + 1].diff())  # [entries]
        block = torch.zeros(stop - start, self.in_features, device=self.values.device)
        block[row, self.columns[first:last].long()] = self.values[first:last].float()
        return block
