"""Llama 2 to 3.3, and models of the same build: TinyLlama, SmolLM2, Vicuna, Yi, ..."""

from pathlib import Path
from typing import Any

from engine.models.config import Biases, ModelConfig, read_config
from engine.models.decoder import Decoder, build_decoder
from engine.models.layers import Parts

NAME = "LlamaForCausalLM"
MODEL_TYPE = "llama"


def read(folder: Path, hf: Any) -> ModelConfig:
    """Biases are off unless the configuration turns them on; all four attention projections share one switch."""
    biases = Biases(qkv=hf.attention_bias, output=hf.attention_bias, mlp=hf.mlp_bias)
    return read_config(folder, hf, biases, qk_norm=False)


def build(config: ModelConfig, parts: Parts) -> Decoder:
    return build_decoder(config, parts)
