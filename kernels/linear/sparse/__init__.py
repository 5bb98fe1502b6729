"""The sparse family: few values, each with its column."""

from kernels.contract import LinearKernel
from kernels.linear.sparse.gpu import SparseTriton
from kernels.linear.sparse.reference import SparseReference

KERNELS: tuple[LinearKernel, ...] = (SparseTriton(), SparseTriton(fixed=True), SparseReference())  # fastest first
