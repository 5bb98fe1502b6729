"""The dense family: weights stored as they multiply, float32, float16 or bfloat16."""

from kernels.contract import LinearKernel
from kernels.linear.dense.gpu import DenseCublas
from kernels.linear.dense.native import DenseNative
from kernels.linear.dense.reference import DenseReference

KERNELS: tuple[LinearKernel, ...] = (
    DenseNative(),
    DenseCublas(),
    DenseCublas(fixed=True),
    DenseReference(),
)  # fastest first
