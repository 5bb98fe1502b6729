"""The weight families and their back ends."""

from kernels.contract import LinearKernel
from kernels.registry import discover


def kernels_for(family: str) -> tuple[LinearKernel, ...]:
    """Back ends of a weight family ("affine", "dense"), fastest first. Raises ValueError when there is none."""
    return discover("kernels.linear", family)
