"""RMSNorm."""

from kernels.contract import NormKernel
from kernels.norm.reference import NormReference

KERNELS: tuple[NormKernel, ...] = (NormReference(),)  # fastest first
