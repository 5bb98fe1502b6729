"""The affine family: w = scale * (code - zero) per group of input channels, 1 to 8 bits."""

from kernels.contract import LinearKernel
from kernels.linear.affine.gpu import AffineTriton
from kernels.linear.affine.native import AffineNative, AffineNativeFloat
from kernels.linear.affine.reference import AffineReference

KERNELS: tuple[LinearKernel, ...] = (
    AffineNative(),
    AffineNativeFloat(),
    AffineTriton(),
    AffineTriton(fixed=True),
    AffineReference(),
)  # fastest first
