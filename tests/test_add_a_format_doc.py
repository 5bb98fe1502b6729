"""docs/add-a-format.md is true: what it quotes stands in the file it names, and its example runs."""

import json
import re
from pathlib import Path
from typing import get_args

import torch

from engine.checkpoint.nibble import read_config
from engine.checkpoint.source import Source
from engine.checkpoint.terms import STEPS, Term

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/add-a-format.md").read_text()
BLOCKS = re.findall(r"```(python|json)\n(.*?)```", TEXT, re.DOTALL)


def test_quoted_code_is_the_code() -> None:
    """Bug: a guide to a program that was changed since."""
    quoted = [block.split("\n", 1) for kind, block in BLOCKS if kind == "python" and block.startswith("# ")]
    assert len(quoted) == 2
    for first, code in quoted:
        assert code in (ROOT / first.removeprefix("# ")).read_text()


def test_the_example_can_be_read_again(tmp_path: Path) -> None:
    """Bug: a script that users copy and that writes what the server refuses."""
    (script,) = [block for kind, block in BLOCKS if kind == "python" and not block.startswith("# ")]
    world: dict[str, object] = {"folder": tmp_path}
    exec(script, world)
    config = json.loads(json.dumps(world["quantization_config"]))
    read = read_config(config).linear(Source(tmp_path), "model.layers.0.mlp.up_proj", (64, 96), False)
    assert torch.equal(read.dequantize(), world["layer"].dequantize())  # type: ignore[attr-defined]


def test_the_config_shown_is_accepted() -> None:
    (shown,) = [block for kind, block in BLOCKS if kind == "json"]
    read_config(json.loads("{" + shown + "}")["quantization_config"])


def test_every_family_and_transform_is_in_a_table() -> None:
    listed = re.findall(r"^\| `(\w+)` \|([^|]*)\|", TEXT, re.MULTILINE)
    fields = {name: set(re.findall(r"`(\w+)`", cells)) for name, cells in listed}
    terms = {str(kind.__struct_config__.tag): kind for kind in get_args(Term)}
    assert fields == {tag: set(struct.__struct_fields__) for tag, struct in (terms | STEPS).items()}
