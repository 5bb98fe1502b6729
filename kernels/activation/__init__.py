"""The gate of an MLP."""

from kernels.activation.reference import ActivationReference
from kernels.contract import ActivationKernel

KERNELS: tuple[ActivationKernel, ...] = (ActivationReference(),)  # fastest first
