"""Write a trained run as a Hugging Face checkpoint in float16: `python -m demo.export RUN FOLDER`."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from demo import tokenizer
from demo.model import ModelConfig
from demo.text import CLOSE, END


def hf_config(config: ModelConfig, end: int | None, close: int | None) -> dict[str, Any]:
    """The config.json of the architecture."""
    sizes = config.to_dict()
    theta = sizes.pop("rope_theta")
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **sizes,
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "use_cache": True,
        "initializer_range": 0.02,
        "bos_token_id": None,
        "eos_token_id": close,
        "pad_token_id": end,
        "torch_dtype": "float16",
    }


def write_json(path: Path, content: dict[str, object]) -> None:
    """Write indented JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def export(weights: dict[str, Tensor], tokens: Path, folder: Path) -> None:
    """Write config, generation config, tokenizer and float16 weights into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = Tokenizer.from_file(str(tokens))
    tokenizer.save(vocabulary, folder)
    end, close = vocabulary.token_to_id(END), vocabulary.token_to_id(CLOSE)
    write_json(folder / "config.json", hf_config(ModelConfig(), end, close))
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.95}
    write_json(folder / "generation_config.json", {"eos_token_id": [close, end], "pad_token_id": end, **sampling})
    half = {name: weight.to(torch.float16).contiguous() for name, weight in weights.items()}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Export RUN to FOLDER, replacing what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.folder.exists():
        shutil.rmtree(args.folder)
    state = torch.load(args.run / "state.pt", map_location="cpu", weights_only=True)
    export(state["model"], args.run / "tokenizer.json", args.folder)


if __name__ == "__main__":
    main()
