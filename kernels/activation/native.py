"""SwiGLU in C++ (kernels/native/rows.cpp)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import native
from kernels.activation.checks import check_gate
from kernels.contract import RowSpec
from kernels.native.checks import check_memory

if native.MISSING is None or TYPE_CHECKING:
    from kernels.native import _native


class ActivationNative:
    """y = gate / (1 + exp(-gate)) * up, in float32, with an exp of its own that errs by at most 1.01 ulp and gives the
    same bits in every instruction set (kernels/native/simd/math.hpp).

    Reads two and writes one: 3 * 4 bytes and some 20 operations an element.
    """

    name = "native"

    def refuses(self, spec: RowSpec) -> str | None:
        return native.refusal(spec.device, spec.dtype)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """gate, up: [num_tokens, width] float32 -> the same shape."""
        check_gate(gate, up)
        check_memory("the gate", gate)
        check_memory("what it gates", up)
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        _native.swiglu(gate.data_ptr(), up.data_ptr(), gate.numel(), out.data_ptr())
        return out
