"""Qwen 3: every query and key head is normalized before RoPE; head_dim is independent of hidden_size."""

from pathlib import Path
from typing import Any

from engine.models.config import Biases, ModelConfig, read_config
from engine.models.decoder import Decoder, build_decoder
from engine.models.layers import Parts

NAME = "Qwen3ForCausalLM"
MODEL_TYPE = "qwen3"


def read(folder: Path, hf: Any) -> ModelConfig:
    return read_config(folder, hf, Biases(qkv=hf.attention_bias, output=hf.attention_bias), qk_norm=True)


def build(config: ModelConfig, parts: Parts) -> Decoder:
    return build_decoder(config, parts)
