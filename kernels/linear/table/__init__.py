"""The table family: w = scale * table[code] with at most 16 entries."""

from kernels.contract import LinearKernel
from kernels.linear.table.gpu import TableTriton
from kernels.linear.table.native import TableNative, TableNativeFloat
from kernels.linear.table.reference import TableReference

KERNELS: tuple[LinearKernel, ...] = (
    TableNative(),
    TableNativeFloat(),
    TableTriton(),
    TableTriton(fixed=True),
    TableReference(),
)  # fastest first
