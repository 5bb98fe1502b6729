"""Rotary position embedding."""

from kernels.contract import RopeKernel
from kernels.rope.gpu import RopeTriton
from kernels.rope.native import RopeNative
from kernels.rope.reference import RopeReference

KERNELS: tuple[RopeKernel, ...] = (RopeNative(), RopeTriton(), RopeReference())  # fastest first
