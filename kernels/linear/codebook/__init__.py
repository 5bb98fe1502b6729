"""The codebook family: short vectors of channels from one table of vectors."""

from kernels.contract import LinearKernel
from kernels.linear.codebook.gpu import CodebookTriton
from kernels.linear.codebook.reference import CodebookReference

KERNELS: tuple[LinearKernel, ...] = (
    CodebookTriton(),
    CodebookTriton(fixed=True),
    CodebookReference(),
)  # fastest first
