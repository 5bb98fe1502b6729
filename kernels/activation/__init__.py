"""The gate of an MLP."""

from kernels.activation.gpu import ActivationTriton
from kernels.activation.native import ActivationNative
from kernels.activation.reference import ActivationReference
from kernels.contract import ActivationKernel

KERNELS: tuple[ActivationKernel, ...] = (ActivationNative(), ActivationTriton(), ActivationReference())  # fastest first
