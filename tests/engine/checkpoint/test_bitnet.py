"""BitNet: tensors written by transformers' own packing, and configs that are refused."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.checkpoint.bitnet import read_config
from engine.checkpoint.errors import FormatRefused, TensorError
from engine.checkpoint.format import detect
from engine.checkpoint.source import Source

with warnings.catch_warnings():  # its decorators load parts of torch that warn of others
    warnings.simplefilter("ignore")
    from transformers.integrations.bitnet import pack_weights

NAME = "model.layers.0.mlp.down_proj"
CONFIG = {"quant_method": "bitnet", "linear_class": "bitlinear", "quantization_mode": "offline"}


def write(folder: Path, ternary: Tensor, scale: float, **others: Tensor) -> Source:
    """A checkpoint of one layer. ternary: [out, in] of -1, 0, 1."""
    packed = pack_weights(ternary.clone().float())
    stored = torch.tensor([scale], dtype=torch.bfloat16)
    save_file({f"{NAME}.weight": packed, f"{NAME}.weight_scale": stored, **others}, folder / "model.safetensors")
    return Source(folder)


def ternary_of(rows: int, columns: int) -> Tensor:
    return torch.randint(-1, 2, (rows, columns), generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize(("rows", "columns"), [(8, 20), (12, 33), (64, 128)])
@pytest.mark.parametrize("kind", ["bitlinear", "autobitlinear"])
def test_weights_are_the_ones_that_were_packed(tmp_path: Path, rows: int, columns: int, kind: str) -> None:
    """Bug: rows in the order of the bytes, or a scale multiplied that the layer divides by."""
    ternary = ternary_of(rows, columns)
    source = write(tmp_path, ternary, 2.75)
    reader = detect({"quantization_config": CONFIG | {"linear_class": kind}}, source)
    read = reader.linear(source, NAME, (rows, columns), bias=False)
    expected = ternary.float() / 2.75 if kind == "bitlinear" else ternary.float() * 2.75
    assert torch.equal(read.dequantize(), expected)
    assert read.terms[0].family == "table"
    assert read.terms[0].bits == 2


def test_layers_left_in_16_bits_come_back_dense(tmp_path: Path) -> None:
    weight = torch.randn(8, 16).bfloat16()
    source = write(tmp_path, ternary_of(8, 16), 1.0, **{"lm_head.weight": weight})
    read = read_config(CONFIG).linear(source, "lm_head", (8, 16), bias=False)
    assert torch.equal(read.dequantize(), weight.float())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"quantization_mode": "online"}, "online.*convert"),
        ({"use_rms_norm": True}, "use_rms_norm"),
        ({"linear_class": "other"}, "linear_class"),
        ({"group_size": 64}, "group_size"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatRefused, match=message):
        read_config(CONFIG | setting)


def test_damaged_tensors_are_named(tmp_path: Path) -> None:
    """Bug: a fourth code read as the weight 2, a scale of zero that makes every weight infinite."""
    source = write(tmp_path, torch.full((8, 16), 2), 1.0)
    with pytest.raises(TensorError, match=r"down_proj.weight'.*code 3"):
        read_config(CONFIG).linear(source, NAME, (8, 16), bias=False)
    source = write(tmp_path, ternary_of(8, 16), 0.0)
    with pytest.raises(TensorError, match="weight_scale"):
        read_config(CONFIG).linear(source, NAME, (8, 16), bias=False)
    with pytest.raises(TensorError, match=r"expected \[4, 16\]"):
        read_config(CONFIG).linear(source, NAME, (16, 16), bias=False)


def test_json_of_a_released_checkpoint_is_understood() -> None:
    released = '{"linear_class": "autobitlinear", "modules_to_not_convert": ["lm_head"], "quant_method": "bitnet", \
        "quantization_mode": "offline", "rms_norm_eps": 1e-06, "use_rms_norm": false}'
    assert not read_config(json.loads(released)).divides
