"""The settings of a config.json by name, each checked where it is read.

Whoever writes a Hugging Face configuration may leave out what its architecture assumes. What makes a model without
which nothing fits, its sizes, has no such default here: a file without one of them is refused by that name, where an
assumed size would end in a tensor of another shape. Needs no transformers, whose import and checks take 1.6 s.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

# What may be left out in every architecture.
ASSUMED: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    }
)
# Lists are made by these before a tensor is looked at.
LARGEST: Mapping[str, int] = MappingProxyType(
    {
        "num_hidden_layers": 1 << 12,
        "num_attention_heads": 1 << 16,
        "num_key_value_heads": 1 << 16,
        "head_dim": 1 << 16,
        "vocab_size": 1 << 28,
        "hidden_size": 1 << 24,
        "intermediate_size": 1 << 24,
        "max_position_embeddings": 1 << 40,
    }
)


class UnsupportedModel(ValueError):
    """The checkpoint is not one that can be served; the message names what stands in the way."""


class Settings:
    """A config.json, and what its architecture assumes of settings that it leaves out. Every method that returns a
    value raises UnsupportedModel naming a setting that is missing or of another kind."""

    def __init__(self, path: Path, values: Mapping[str, Any], assumed: Mapping[str, Any]) -> None:
        self.path = path
        self._values = {**ASSUMED, **assumed, **values}

    def get(self, name: str) -> Any:
        """As it stands, or None."""
        return self._values.get(name)

    def size(self, name: str) -> int:
        """A number of elements: from 1 to LARGEST."""
        if name not in self._values:
            raise UnsupportedModel(
                f"{self.path} has no {name}, without which the model cannot be built: take the config.json that "
                "belongs to the weights"
            )
        value = self._values[name]
        if type(value) is not int:
            raise UnsupportedModel(f"{name} must be a whole number; found {value!r}")
        if not 1 <= value <= LARGEST[name]:
            raise UnsupportedModel(f"{name} must be at least 1, and at most {LARGEST[name]:,}; found {value}")
        return value

    def size_or_none(self, name: str) -> int | None:
        """Likewise; None where it is left out or null."""
        return None if self.get(name) is None else self.size(name)

    def number(self, name: str) -> float:
        """Finite, or not a number at all: who reads it says what it may be."""
        return number(name, self.get(name))

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if type(value) is not bool:
            raise UnsupportedModel(f"{name} must be true or false; found {value!r}")
        return value


def number(name: str, value: object) -> float:
    """Raises UnsupportedModel for what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UnsupportedModel(f"{name} must be a number; found {value!r}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def read_json(folder: Path) -> dict[str, Any]:
    """Return the checkpoint's config.json as it stands. Raises UnsupportedModel when it is missing or not JSON."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UnsupportedModel(f"{folder} is not a model folder: it has no config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedModel(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UnsupportedModel(f"{path} must hold a JSON object, found {type(content).__name__}")
    return content
