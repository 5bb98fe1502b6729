"""Quantized pages, the recent tokens and the first few in high precision."""

from kernels.attention.quantized.cache import QuantizedKernel
from kernels.attention.quantized.gpu import QuantizedTriton
from kernels.attention.quantized.native import QuantizedNative
from kernels.attention.quantized.reference import QuantizedReference

KERNELS: tuple[QuantizedKernel, ...] = (
    QuantizedNative(),
    QuantizedTriton(),
    QuantizedTriton(fixed=True),
    QuantizedReference(),
)  # fastest first
