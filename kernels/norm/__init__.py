"""RMSNorm."""

from kernels.contract import NormKernel
from kernels.norm.gpu import NormTriton
from kernels.norm.native import NormNative
from kernels.norm.reference import NormReference

KERNELS: tuple[NormKernel, ...] = (NormNative(), NormTriton(), NormReference())  # fastest first
