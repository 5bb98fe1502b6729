"""SwiGLU on NVIDIA GPUs, in Triton (kernels/gpu/rows.py)."""

import torch
from torch import Tensor

from kernels.activation.checks import check_gate
from kernels.contract import RowSpec
from kernels.gpu import refusal
from kernels.gpu.checks import check_memory

BLOCK = 1024  # elements of a program
NUM_WARPS = 4


class ActivationTriton:
    """y = gate / (1 + exp(-gate)) * up, in float32, rounded once to bfloat16.

    Reads two and writes one: 3 * 2 bytes and 5 operations an element.
    """

    name = "triton"

    def refuses(self, spec: RowSpec) -> str | None:
        return refusal(spec.device, spec.dtype)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """gate, up: [num_tokens, width] bfloat16 -> the same shape."""
        from kernels.gpu import rows

        check_gate(gate, up)
        check_memory("the gate", gate, gate)
        check_memory("what it gates", up, gate)
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        if gate.numel():
            rows.swiglu[(-(-gate.numel() // BLOCK),)](gate, up, out, gate.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS)
        return out
