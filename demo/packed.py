"""Read a checkpoint of this folder as float32 weights, packed to 4 bits or not, without extra libraries."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3Config

PER_WORD = 8  # 4-bit codes in an int32, the first in the lowest bits
OFFSET = 8  # a code is stored as value + 8


def unpack(packed: Tensor, scale: Tensor) -> Tensor:
    """packed [out, in / 8] int32, scale [out, in / group] -> weight [out, in], float32."""
    shifts = torch.arange(PER_WORD, dtype=torch.int32) * 4
    codes = ((packed[:, :, None] >> shifts) & 15).flatten(1) - OFFSET  # [out, in]
    return codes.float() * scale.float().repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)


def plain_weights(folder: Path) -> tuple[Qwen3Config, dict[str, Tensor]]:
    """(config without quantization, state dict in float32)."""
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    fields.pop("quantization_config", None)
    tensors = load_file(folder / "model.safetensors")
    weights = {}
    for name, tensor in tensors.items():
        if name.endswith("weight_packed"):
            weights[name.removesuffix("_packed")] = unpack(tensor, tensors[name.replace("_packed", "_scale")])
        elif name.endswith(".weight"):
            weights[name] = tensor.float()
    return Qwen3Config(**{**fields, "torch_dtype": "float32"}), weights
