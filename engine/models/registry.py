"""The architectures that can be served."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from engine.models import llama, mistral, qwen2, qwen3
from engine.models.config import ModelConfig, UnsupportedModel, load_hf_config, read_json
from engine.models.decoder import Decoder
from engine.models.layers import Parts


class Architecture(Protocol):
    """What an architecture file provides."""

    NAME: str  # as config.json lists it
    MODEL_TYPE: str  # transformers' name for its configuration

    def read(self, folder: Path, hf: Any) -> ModelConfig:
        """Translate a transformers configuration. Raises UnsupportedModel."""
        ...

    def build(self, config: ModelConfig, parts: Parts) -> Decoder:
        """Assemble the model from its layers."""
        ...


ASVD = "ASVD"  # before the name of a model of which some layers are low-rank pairs (engine/checkpoint/asvd.py)
ARCHITECTURES: tuple[Architecture, ...] = (llama, mistral, qwen2, qwen3)


@dataclass(frozen=True)
class ModelDescription:
    """A checkpoint's configuration and the architecture that reads it."""

    architecture: Architecture
    config: ModelConfig


def describe(folder: Path) -> ModelDescription:
    """Read config.json. Raises UnsupportedModel, with what is supported, when the model cannot be served."""
    raw = read_json(folder)
    listed = raw.get("architectures")
    named = [str(name).removeprefix(ASVD) for name in (listed if isinstance(listed, list) else [])]
    for architecture in ARCHITECTURES:
        if architecture.NAME in named and raw.get("model_type") == architecture.MODEL_TYPE:
            return ModelDescription(architecture, architecture.read(folder, load_hf_config(folder)))
    supported = ", ".join(architecture.NAME for architecture in ARCHITECTURES)
    raise UnsupportedModel(
        f"{folder}: architecture {', '.join(map(str, named)) or 'none'} with model_type {raw.get('model_type')!r} is "
        f"not supported; supported are {supported}"
    )
