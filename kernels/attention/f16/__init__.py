"""Pages of plain floating point: float16, or float32 for the oracle that tests compare with."""

from kernels.attention.f16.gpu import F16Triton
from kernels.attention.f16.native import F16Native
from kernels.attention.f16.reference import F16Reference
from kernels.contract import AttentionKernel

KERNELS: tuple[AttentionKernel, ...] = (
    F16Native(),
    F16Triton(),
    F16Triton(fixed=True),
    F16Reference(),
)  # fastest first
