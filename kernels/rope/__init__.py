"""Rotary position embedding."""

from kernels.contract import RopeKernel
from kernels.rope.reference import RopeReference

KERNELS: tuple[RopeKernel, ...] = (RopeReference(),)  # fastest first
