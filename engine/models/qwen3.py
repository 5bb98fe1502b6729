"""Qwen 3: every query and key head is normalized before RoPE; head_dim is independent of hidden_size."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from engine.models.config import Biases, ModelConfig, qwen_window, read_config
from engine.models.decoder import Decoder, build_decoder
from engine.models.layers import Parts
from engine.models.settings import Settings

NAME = "Qwen3ForCausalLM"
MODEL_TYPE = "qwen3"
ASSUMED: Mapping[str, Any] = MappingProxyType(
    {"max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
)


def read(settings: Settings) -> ModelConfig:
    shared = settings.flag("attention_bias")
    return read_config(settings, Biases(qkv=shared, output=shared), qk_norm=True, window=qwen_window(settings))


def build(config: ModelConfig, parts: Parts) -> Decoder:
    return build_decoder(config, parts)
