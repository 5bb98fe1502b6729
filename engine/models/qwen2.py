"""Qwen 2 and 2.5: Llama with biases on the query, key and value projections."""

from pathlib import Path
from typing import Any

from engine.models.config import Biases, ModelConfig, read_config
from engine.models.decoder import Decoder, build_decoder
from engine.models.layers import Parts

NAME = "Qwen2ForCausalLM"
MODEL_TYPE = "qwen2"


def read(folder: Path, hf: Any) -> ModelConfig:
    return read_config(folder, hf, Biases(qkv=True), qk_norm=False)


def build(config: ModelConfig, parts: Parts) -> Decoder:
    return build_decoder(config, parts)
