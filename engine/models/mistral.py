"""Mistral 7B v0.1 to v0.3, Mistral Nemo (whose head_dim is not hidden_size / num_heads): Llama without biases.

v0.1 limits attention to the last 4,096 tokens; read_config bounds the context there, where both are the same.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from engine.models.config import Biases, ModelConfig, read_config, sliding_window
from engine.models.decoder import Decoder, build_decoder
from engine.models.layers import Parts
from engine.models.settings import Settings

NAME = "MistralForCausalLM"
MODEL_TYPE = "mistral"
ASSUMED: Mapping[str, Any] = MappingProxyType(
    {"max_position_embeddings": 131072, "sliding_window": 4096, "eos_token_id": 2}
)


def read(settings: Settings) -> ModelConfig:
    return read_config(settings, Biases(), qk_norm=False, window=sliding_window(settings))


def build(config: ModelConfig, parts: Parts) -> Decoder:
    return build_decoder(config, parts)
