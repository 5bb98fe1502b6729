"""The low-rank family: W = A B, never multiplied out."""

from kernels.contract import LinearKernel
from kernels.linear.lowrank.native import LowRankNative
from kernels.linear.lowrank.reference import LowRankReference

KERNELS: tuple[LinearKernel, ...] = (LowRankNative(), LowRankReference())  # fastest first
