"""Small configurations that between them cover what the four architectures can vary."""

from typing import Any

from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

SIZES: dict[str, Any] = {
    "vocab_size": 101,  # odd, prime
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def variants() -> dict[str, PreTrainedConfig]:
    """Name -> configuration. Models are made from them, so every call returns new ones."""
    return {
        "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
        "llama-biases": LlamaConfig(**SIZES, head_dim=20, attention_bias=True, mlp_bias=True),
        "llama-one-kv-head": LlamaConfig(**SIZES | {"num_key_value_heads": 1}),
        "llama-linear": LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
        "llama-dynamic": LlamaConfig(
            **SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        ),
        "llama-llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
        "llama-yarn": LlamaConfig(**SIZES, rope_parameters=YARN),
        "mistral": MistralConfig(**SIZES, head_dim=16, sliding_window=37),  # the longest prompt just fits
        "qwen2-tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
        "qwen2-yarn": Qwen2Config(**SIZES, rope_parameters=YARN | {"attention_factor": 1.3, "truncate": False}),
        "qwen3": Qwen3Config(**SIZES, head_dim=20),
        "qwen3-tied-biases": Qwen3Config(**SIZES, head_dim=32, attention_bias=True, tie_word_embeddings=True),
    }
