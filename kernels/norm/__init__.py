"""RMSNorm."""

from kernels.contract import NormKernel
from kernels.norm.native import NormNative
from kernels.norm.reference import NormReference

KERNELS: tuple[NormKernel, ...] = (NormNative(), NormReference())  # fastest first
