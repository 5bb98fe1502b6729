"""RMSNorm in C++ (kernels/native/rows.cpp)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import native
from kernels.contract import RowSpec
from kernels.native.checks import check_memory
from kernels.norm.checks import check_rows

if native.MISSING is None or TYPE_CHECKING:
    from kernels.native import _native


class NormNative:
    """y = w x / sqrt(mean(x^2) + eps), in float32.

    Squares are summed in 64 lanes and the lanes by halves, so that a row's result is the same to the last bit in any
    batch, on any number of threads and in any instruction set. Reads and writes a row once: 2 * 4 bytes and 4
    operations an element; with the addition before it 4 * 4 bytes and 5 operations.
    """

    name = "native"

    def refuses(self, spec: RowSpec) -> str | None:
        return native.refusal(spec.device, spec.dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x: [..., width], weight: [width], both float32 -> x's shape."""
        check_rows(x, weight)
        check_memory("rows", x)
        check_memory("the weight", weight)
        x, weight = x.contiguous(), weight.contiguous()
        out = torch.empty_like(x)
        width = weight.shape[0]
        _native.rms_norm(x.data_ptr(), weight.data_ptr(), x.numel() // width, width, eps, out.data_ptr())
        return out

    def add_rms_norm(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """x, delta: [..., width], weight: [width], all float32 -> (x + delta, its norm)."""
        check_rows(x, weight, delta)
        check_memory("rows", x)
        check_memory("the addend", delta)
        check_memory("the weight", weight)
        x, delta, weight = x.contiguous(), delta.contiguous(), weight.contiguous()
        total, out = torch.empty_like(x), torch.empty_like(x)
        width = weight.shape[0]
        _native.add_rms_norm(
            x.data_ptr(),
            delta.data_ptr(),
            weight.data_ptr(),
            x.numel() // width,
            width,
            eps,
            total.data_ptr(),
            out.data_ptr(),
        )
        return total, out
