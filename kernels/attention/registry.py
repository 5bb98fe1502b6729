"""The cache codecs and their back ends."""

from typing import Any

from kernels.registry import discover


def kernels_for(codec: str) -> tuple[Any, ...]:
    """Back ends of a cache codec ("f16", "quantized"), fastest first. Raises ValueError when there is none."""
    return discover("kernels.attention", codec)
