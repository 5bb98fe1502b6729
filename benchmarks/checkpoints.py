"""Checkpoints of public shapes with random weights: speed and memory do not depend on the values."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.shapes import BIASED, Shape

NAMES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
SCALE_BITS = 16
CONTEXT_LEN = 8192


@dataclass(frozen=True)
class Affine:
    """compressed-tensors "pack-quantized": codes of `bits` in groups, scales in bfloat16, zeros packed like codes."""

    bits: int = 4  # 2, 4 or 8
    group_size: int = 128
    symmetric: bool = True

    @property
    def bits_per_weight(self) -> float:
        parameters = SCALE_BITS if self.symmetric else SCALE_BITS + self.bits
        return self.bits + parameters / self.group_size

    def describe(self) -> str:
        return f"{self.bits}-bit g{self.group_size} {'symmetric' if self.symmetric else 'asymmetric'}"

    def matrix(self, rows: int, columns: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random codes; scales that give the weights a standard deviation near 1 / sqrt(columns)."""
        num_groups = columns // self.group_size
        spread = 2**self.bits / 12**0.5  # of codes that are all as likely
        tensors = {
            "weight_packed": _words(rows, columns * self.bits // 32, generator),
            "weight_scale": torch.full((rows, num_groups), 1 / (spread * columns**0.5), dtype=torch.bfloat16),
            "weight_shape": torch.tensor([rows, columns]),
        }
        if not self.symmetric:
            tensors["weight_zero_point"] = _words(rows * self.bits // 32, num_groups, generator)
        return tensors

    def config(self) -> dict[str, object]:
        """The quantization_config."""
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "group_size": self.group_size,
            "strategy": "group",
            "dynamic": False,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": weights,
                    "input_activations": None,
                    "output_activations": None,
                }
            },
        }


@dataclass(frozen=True)
class Ternary:
    """BitNet: -1, 0 and 1 in 2 bits, one scale for a matrix. Five of them fit a byte, and may be kept so in memory."""

    bits_per_weight: float = 2.0

    def describe(self) -> str:
        return "ternary"

    def matrix(self, rows: int, columns: int, generator: torch.Generator) -> dict[str, Tensor]:
        quarters = torch.randint(0, 3, (4, rows // 4, columns), generator=generator, dtype=torch.uint8)
        packed = quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6
        return {"weight": packed, "weight_scale": torch.tensor([(columns * 2 / 3) ** 0.5], dtype=torch.bfloat16)}

    def config(self) -> dict[str, object]:
        return {"quant_method": "bitnet", "linear_class": "bitlinear", "quantization_mode": "offline"}


Weights = Affine | Ternary
DEFAULT = Affine()


def write_checkpoint(folder: Path, shape: Shape, weights: Weights = DEFAULT) -> int:
    """Write a checkpoint of the shape, one shard a layer, its embedding in bfloat16. Returns its tensors' bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    outer = {"model.embed_tokens.weight": _dense(shape.vocab, shape.hidden), "model.norm.weight": _norm(shape)}
    if not shape.tied:
        outer["lm_head.weight"] = _dense(shape.vocab, shape.hidden)
    shards = {"model-outer.safetensors": outer}
    for i in range(shape.num_layers):
        shards[f"model-{i:03d}.safetensors"] = _layer(shape, weights, f"model.layers.{i}", generator)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(_config(shape, weights), indent=1))
    return sum(t.numel() * t.element_size() for tensors in shards.values() for t in tensors.values())


def _layer(shape: Shape, weights: Weights, name: str, generator: torch.Generator) -> dict[str, Tensor]:
    tensors = {f"{name}.{norm}.weight": _norm(shape) for norm in ("input_layernorm", "post_attention_layernorm")}
    for role, (rows, columns) in shape.linears().items():
        for suffix, tensor in weights.matrix(rows, columns, generator).items():
            tensors[f"{name}.{NAMES[role]}.{suffix}"] = tensor
        if shape.qkv_bias and role in BIASED:
            tensors[f"{name}.{NAMES[role]}.bias"] = torch.zeros(rows, dtype=torch.bfloat16)
    return tensors


def _words(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, (rows, columns), generator=generator, dtype=torch.int32)


def _dense(rows: int, columns: int) -> Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.02).bfloat16()


def _norm(shape: Shape) -> Tensor:
    return torch.ones(shape.hidden, dtype=torch.bfloat16)


def _config(shape: Shape, weights: Weights) -> dict[str, object]:
    return {
        "architectures": ["Qwen2ForCausalLM" if shape.qkv_bias else "LlamaForCausalLM"],
        "model_type": "qwen2" if shape.qkv_bias else "llama",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": CONTEXT_LEN,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
        "quantization_config": weights.config(),
    }
