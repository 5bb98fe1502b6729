"""The sparse family: few values, each with its column."""

from kernels.contract import LinearKernel
from kernels.linear.sparse.reference import SparseReference

KERNELS: tuple[LinearKernel, ...] = (SparseReference(),)
