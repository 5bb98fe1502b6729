"""Pack a float16 checkpoint to 4 bits with the compressed-tensors library.

`python -m demo.pack demo/checkpoint-fp16 demo/checkpoint [--books DIR]`; needs `pip install compressed-tensors`.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from demo import books as library
from demo.gptq import GROUP, quantize_model
from demo.mixture import Mixture, Stage

CALIBRATION = Stage(1.0, 1024, 8192, 0.5, 0.5)
BATCHES = 8


def calibration(folder: Path, books: Path | None) -> list[Tensor]:
    """Training rows [8, 1024] of every kind, drawn with a seed of their own."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    mixture = Mixture(tokenizer, library.load(books), seed=77)
    return [mixture.batch(CALIBRATION)[0][:, :-1] for _ in range(BATCHES)]


def compress(model: nn.Module, scales: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Let the library pack the rounded weights and write its part of config.json; returns the tensors."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        apply_quantization_config,
    )

    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    apply_quantization_config(
        model,
        QuantizationConfig(
            config_groups={"group_0": scheme},
            ignore=["lm_head"],
            quantization_status=QuantizationStatus.FROZEN,
            format="pack-quantized",
        ),
    )
    for name, scale in scales.items():
        module = model.get_submodule(name)
        module.weight_scale.data = scale.to(torch.float16)
    model.to(torch.float16)
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format="pack-quantized")
    compressor.compress_model(model)
    compressor.update_config(str(folder))
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


def pack(source: Path, target: Path, books: Path | None) -> None:
    """Quantize the checkpoint at source and write it to target, replacing what is there."""
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(str(source), dtype=torch.float32)
    scales = quantize_model(model, calibration(source, books), list(model.model.layers))
    save_file(compress(model, scales, target), target / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Pack one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--books", type=Path, default=None, help="folder of books, for calibration text")
    args = parser.parse_args()
    pack(args.source, args.target, args.books)


if __name__ == "__main__":
    main()
