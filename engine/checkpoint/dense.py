"""Unquantized checkpoints: float32, float16 or bfloat16 weights, served in the dtype they are stored in."""

from dataclasses import dataclass

from engine.checkpoint.linear import read_dense
from engine.checkpoint.source import Source
from kernels.linear.weights import LinearWeights


@dataclass(frozen=True)
class Dense:
    """The reader of checkpoints without a quantization config."""

    name: str = "dense"

    def describe(self) -> str:
        return "unquantized"

    def linear(self, source: Source, name: str, shape: tuple[int, int], bias: bool) -> LinearWeights:
        return read_dense(source, name, shape, bias)
