"""The int8 family: integer weights times activations that the format itself rounds to integers."""

from kernels.contract import LinearKernel
from kernels.linear.int8.gpu import Int8Triton
from kernels.linear.int8.native import Int8Native
from kernels.linear.int8.reference import Int8Reference

KERNELS: tuple[LinearKernel, ...] = (
    Int8Native(),
    Int8Triton(),
    Int8Triton(fixed=True),
    Int8Reference(),
)  # fastest first
