"""The definition of SwiGLU."""

import torch
from torch import Tensor

from kernels.activation.checks import check_gate
from kernels.contract import RowSpec


class ActivationReference:
    """y = silu(gate) * up = gate / (1 + exp(-gate)) * up,  in float32, rounded once to the inputs' dtype.

    Reads two and writes one: 3 * 4 bytes and 5 operations an element. Spelled out, because torch's silu computes the
    last few elements of a tensor in another way than the others: a token's result would depend on its place in a batch.
    """

    name = "reference"

    def refuses(self, spec: RowSpec) -> str | None:
        return None

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """gate, up: [num_tokens, width] -> the same shape and dtype."""
        check_gate(gate, up)
        wide = gate.float()
        return (wide / (1 + torch.exp(-wide)) * up.float()).to(gate.dtype)
