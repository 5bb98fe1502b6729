"""One row of logits in C++ (kernels/native/sampling.cpp)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import native
from kernels.contract import Filters, RowSpec

if native.MISSING is None or TYPE_CHECKING:
    from kernels.native import _native


class SamplingNative:
    """As the reference, without sorting it all: ids go into 4,096 buckets by logit, whole buckets stand for their sums,
    and only the one that a filter cuts and the one that holds the drawn id are sorted.

    A draw reads the logits four times and writes 10 bytes an id; 60 operations an id, most of them exp in float64. The
    result depends on the row alone; sums are taken in an order of their own, so that a `uniform` within some 1e-15 of
    the edge between two ids may pick the other one than the reference does.
    """

    name = "native"

    def refuses(self, spec: RowSpec) -> str | None:
        return native.refusal(spec.device, spec.dtype)

    def argmax(self, logits: Tensor) -> int | None:
        """logits: [vocab] float32. None when one is NaN or the largest is not finite."""
        logits = _row(logits)
        index = _native.argmax(logits.data_ptr(), logits.shape[0])
        return None if index < 0 else index

    def draw(self, logits: Tensor, filters: Filters, uniform: float) -> int:
        """logits: [vocab] float32; the largest must be finite, none NaN. Raises ValueError otherwise."""
        logits = _row(logits)
        rules = (filters.temperature, filters.top_k, filters.top_p, filters.min_p)
        index = _native.draw(logits.data_ptr(), logits.shape[0], *rules, uniform)
        if index < 0:
            raise ValueError("nothing can be drawn from logits that are not finite")
        return index

    def log_probs(self, logits: Tensor, token: int, num_top: int) -> tuple[float, list[tuple[int, float]]]:
        """logits: [vocab] float32. Raises ValueError when `token` is not in the vocabulary."""
        logits = _row(logits)
        return _native.log_probs(logits.data_ptr(), logits.shape[0], token, num_top)


def _row(logits: Tensor) -> Tensor:
    if logits.dim() != 1 or logits.shape[0] == 0 or logits.dtype != torch.float32 or not logits.is_cpu:
        found = f"{list(logits.shape)} of {logits.dtype} on {logits.device}"
        raise ValueError(f"logits must be a row of float32 on the CPU, found {found}")
    return logits.contiguous()
