"""The fp8 family: weights in e4m3 with a scale for each block of the matrix."""

from kernels.contract import LinearKernel
from kernels.linear.fp8.gpu import Fp8Triton
from kernels.linear.fp8.native import Fp8Native
from kernels.linear.fp8.reference import Fp8Reference

KERNELS: tuple[LinearKernel, ...] = (
    Fp8Native(),
    Fp8Triton(),
    Fp8Triton(fixed=True),
    Fp8Reference(),
)  # fastest first
