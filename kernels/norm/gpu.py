"""RMSNorm on NVIDIA GPUs, in Triton (kernels/gpu/rows.py)."""

import torch
from torch import Tensor

from kernels.contract import RowSpec
from kernels.gpu import refusal
from kernels.gpu.checks import check_memory
from kernels.norm.checks import check_rows

MAX_WIDTH = 16384  # a program holds a row in registers: 32 elements a thread of 16 warps
ELEMENTS_PER_WARP = 1024


class NormTriton:
    """y = w x / sqrt(mean(x^2) + eps), in float32, the quotient rounded to bfloat16 before it is scaled.

    Reads and writes a row once: 2 * 2 bytes and 4 operations an element; with the addition before it 4 * 2 bytes and 5
    operations. A row is one program's, so that its result does not depend on the batch.
    """

    name = "triton"

    def refuses(self, spec: RowSpec) -> str | None:
        if spec.width > MAX_WIDTH:
            return f"rows of {spec.width} elements do not fit one program; up to {MAX_WIDTH} do"
        return refusal(spec.device, spec.dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x: [..., width], weight: [width], both bfloat16 -> x's shape."""
        check_rows(x, weight)
        check_memory("rows", x, x)
        check_memory("the weight", weight, x)
        x = x.contiguous()
        out = torch.empty_like(x)
        _launch((x, x, weight.contiguous(), out, out), eps, add=False)
        return out

    def add_rms_norm(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """x, delta: [..., width], weight: [width], all bfloat16 -> (x + delta, its norm)."""
        check_rows(x, weight, delta)
        check_memory("rows", x, x)
        check_memory("the addend", delta, x)
        check_memory("the weight", weight, x)
        x, delta, weight = x.contiguous(), delta.contiguous(), weight.contiguous()
        total, out = torch.empty_like(x), torch.empty_like(x)
        _launch((x, delta, weight, total, out), eps, add=True)
        return total, out


def block_for(width: int) -> tuple[int, int]:
    """(elements of a program, its warps) for rows of `width`."""
    block = 1 << (width - 1).bit_length()
    return block, min(16, max(1, block // ELEMENTS_PER_WARP))


def _launch(tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], eps: float, add: bool) -> None:
    """tensors: x, delta, weight, total, out."""
    from kernels.gpu import rows

    x, _, weight, _, _ = tensors
    width = weight.shape[0]
    if x.numel() == 0:
        return
    block, warps = block_for(width)
    rows.rms_norm[(x.numel() // width,)](*tensors, width, eps, ADD=add, BLOCK=block, num_warps=warps)
