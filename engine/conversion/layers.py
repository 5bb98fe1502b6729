"""Which matrices of a checkpoint are linear layers: those that the model itself asks for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.models.config import ModelConfig
from engine.models.layers import Linear, Projections
from engine.models.registry import describe


class _Recorder:
    """engine.models.layers.Parts that gives layers without weights and remembers what was wanted."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, int]] = {}

    def linear(self, name: str, shape: tuple[int, int], bias: bool) -> Linear:
        self.shapes[name] = shape
        return Linear((), (), None)

    def projections(self, layers: Sequence[tuple[str, tuple[int, int]]], bias: bool) -> Projections:
        return Projections([self.linear(name, shape, bias) for name, shape in layers])

    def norm(self, name: str, width: int, eps: float) -> Any:
        return None

    def embedding_and_head(self, embedding: str, head: str, config: ModelConfig) -> tuple[Any, Linear]:
        return None, Linear((), (), None)

    def rope(self, config: ModelConfig) -> Any:
        return None

    def attention_kernel(self, config: ModelConfig, layer: int) -> Any:
        return None

    def activation_kernel(self, config: ModelConfig) -> Any:
        return None


def linear_layers(folder: Path) -> dict[str, tuple[int, int]]:
    """Name -> (out_features, in_features) of every linear layer but the output head. Raises UnsupportedModel."""
    description = describe(folder)
    recorder = _Recorder()
    description.architecture.build(description.config, recorder)
    return recorder.shapes
