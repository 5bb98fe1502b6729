"""The codebook family: short vectors of channels from one table of vectors."""

from kernels.contract import LinearKernel
from kernels.linear.codebook.reference import CodebookReference

KERNELS: tuple[LinearKernel, ...] = (CodebookReference(),)
