"""Llama 2 to 3.3, and models of the same build: TinyLlama, SmolLM2, Vicuna, Yi, ..."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from engine.models.config import Biases, ModelConfig, read_config, sliding_window
from engine.models.decoder import Decoder, build_decoder
from engine.models.layers import Parts
from engine.models.settings import Settings

NAME = "LlamaForCausalLM"
MODEL_TYPE = "llama"
ASSUMED: Mapping[str, Any] = MappingProxyType(
    {"max_position_embeddings": 2048, "num_key_value_heads": None, "eos_token_id": 2}
)


def read(settings: Settings) -> ModelConfig:
    """Biases are off unless the configuration turns them on; all four attention projections share one switch."""
    shared = settings.flag("attention_bias")
    biases = Biases(qkv=shared, output=shared, mlp=settings.flag("mlp_bias"))
    return read_config(settings, biases, qk_norm=False, window=sliding_window(settings))


def build(config: ModelConfig, parts: Parts) -> Decoder:
    return build_decoder(config, parts)
