"""Small checkpoints for the readers: the committed fixtures, and copies of them with one thing changed."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoint.format import Format, detect
from engine.checkpoint.source import Source

FIXTURES = Path(__file__).parents[2] / "fixtures"
ALL = sorted(path.parent.name for path in FIXTURES.glob("*/expected.safetensors"))
QUERY = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"


def reader(folder: Path) -> tuple[Format, Source]:
    """The reader that the folder's config asks for, and its tensors."""
    source = Source(folder)
    return detect(json.loads((folder / "config.json").read_text()), source), source


def expected(folder: Path) -> dict[str, Tensor]:
    """The tool's own dense weights [out, in] by layer name."""
    weights = load_file(folder / "expected.safetensors")
    return {name.removesuffix(".weight"): weight for name, weight in weights.items()}


def changed(fixture: str, folder: Path, tensors: Mapping[str, Tensor | None]) -> Path:
    """Copy an unsharded fixture to `folder` with these tensors replaced, added, or (None) removed."""
    shutil.copytree(FIXTURES / fixture, folder, dirs_exist_ok=True)
    stored = load_file(folder / "model.safetensors")
    merged = {**stored, **tensors}
    # Loaded tensors share the file's memory: copy before it is overwritten.
    save_file({k: v.clone().contiguous() for k, v in merged.items() if v is not None}, folder / "model.safetensors")
    return folder


def stored(fixture: str, name: str) -> Tensor:
    """One tensor of an unsharded fixture."""
    return load_file(FIXTURES / fixture / "model.safetensors")[name]


def quantization_config(fixture: str) -> dict[str, Any]:
    """The quantization config of a fixture, for a test to change."""
    config: dict[str, Any] = json.loads((FIXTURES / fixture / "config.json").read_text())["quantization_config"]
    return config
