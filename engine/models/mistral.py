"""Mistral 7B v0.1 to v0.3, Mistral Nemo (whose head_dim is not hidden_size / num_heads): Llama without biases.

v0.1 limits attention to the last 4,096 tokens; read_config bounds the context there, where both are the same.
"""

from pathlib import Path
from typing import Any

from engine.models.config import Biases, ModelConfig, read_config
from engine.models.decoder import Decoder, build_decoder
from engine.models.layers import Parts

NAME = "MistralForCausalLM"
MODEL_TYPE = "mistral"


def read(folder: Path, hf: Any) -> ModelConfig:
    return read_config(folder, hf, Biases(), qk_norm=False)


def build(config: ModelConfig, parts: Parts) -> Decoder:
    return build_decoder(config, parts)
