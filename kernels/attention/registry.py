"""The cache codecs and their back ends."""

from kernels.contract import AttentionKernel
from kernels.registry import discover


def kernels_for(codec: str) -> tuple[AttentionKernel, ...]:
    """Back ends of a cache codec ("f16"), fastest first. Raises ValueError when there is none."""
    return discover("kernels.attention", codec)
