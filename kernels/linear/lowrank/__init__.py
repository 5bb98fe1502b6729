"""The low-rank family: W = A B, never multiplied out."""

from kernels.contract import LinearKernel
from kernels.linear.lowrank.gpu import LowRankCublas
from kernels.linear.lowrank.native import LowRankNative
from kernels.linear.lowrank.reference import LowRankReference

KERNELS: tuple[LinearKernel, ...] = (
    LowRankNative(),
    LowRankCublas(),
    LowRankCublas(fixed=True),
    LowRankReference(),
)  # fastest first
