"""Checkpoints of public shapes with random weights: speed and memory do not depend on the values."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

GROUP_SIZE = 128
BITS = 4


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-architecture model."""

    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    tied: bool


SMALLEST = Shape(128, 128, 1, 2, 1, 64, 128, True)
SHAPES = {
    "llama-3.2-1b": Shape(2048, 8192, 16, 32, 8, 64, 128_256, True),
    "qwen2.5-0.5b": Shape(896, 4864, 24, 14, 2, 64, 151_936, True),
}


def write_checkpoint(folder: Path, shape: Shape) -> int:
    """Write a compressed-tensors 4-bit checkpoint, symmetric, one shard a layer. Returns its tensors' bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    outer = {"model.embed_tokens.weight": _dense(shape.vocab, shape.hidden), "model.norm.weight": _norm(shape)}
    if not shape.tied:
        outer["lm_head.weight"] = _dense(shape.vocab, shape.hidden)
    shards = {"model-outer.safetensors": outer}
    for i in range(shape.num_layers):
        shards[f"model-{i:03d}.safetensors"] = _layer(shape, f"model.layers.{i}", generator)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(_config(shape), indent=1))
    return sum(t.numel() * t.element_size() for tensors in shards.values() for t in tensors.values())


def _layer(shape: Shape, name: str, generator: torch.Generator) -> dict[str, Tensor]:
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    sizes = {
        "self_attn.q_proj": (q, shape.hidden),
        "self_attn.k_proj": (kv, shape.hidden),
        "self_attn.v_proj": (kv, shape.hidden),
        "self_attn.o_proj": (shape.hidden, q),
        "mlp.gate_proj": (shape.intermediate, shape.hidden),
        "mlp.up_proj": (shape.intermediate, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.intermediate),
    }
    tensors = {f"{name}.{norm}.weight": _norm(shape) for norm in ("input_layernorm", "post_attention_layernorm")}
    for linear, (rows, columns) in sizes.items():
        words = torch.randint(-(2**31), 2**31 - 1, (rows, columns * BITS // 32), generator=generator, dtype=torch.int32)
        tensors[f"{name}.{linear}.weight_packed"] = words
        scale = torch.full((rows, columns // GROUP_SIZE), 0.3 / columns**0.5, dtype=torch.bfloat16)
        tensors[f"{name}.{linear}.weight_scale"] = scale
        tensors[f"{name}.{linear}.weight_shape"] = torch.tensor([rows, columns])
    return tensors


def _dense(rows: int, columns: int) -> Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.02).bfloat16()


def _norm(shape: Shape) -> Tensor:
    return torch.ones(shape.hidden, dtype=torch.bfloat16)


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": BITS,
                        "type": "int",
                        "symmetric": True,
                        "group_size": GROUP_SIZE,
                        "strategy": "group",
                        "dynamic": False,
                    },
                    "input_activations": None,
                    "output_activations": None,
                }
            },
        },
    }
