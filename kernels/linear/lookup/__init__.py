"""The lookup family: every group of a row has a table of its own."""

from kernels.contract import LinearKernel
from kernels.linear.lookup.gpu import LookupTriton
from kernels.linear.lookup.reference import LookupReference

KERNELS: tuple[LinearKernel, ...] = (
    LookupTriton(),
    LookupTriton(fixed=True),
    LookupReference(),
)  # fastest first
