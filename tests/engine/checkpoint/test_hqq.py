"""HQQ: layers that say how they are stored, and what they may say."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.checkpoint.errors import CheckpointError, FormatRefused
from engine.checkpoint.hqq import read_config
from engine.checkpoint.source import Source
from tests.engine.checkpoint.worlds import FIXTURES, QUERY, changed, reader

PLAIN = "hqq-4bit-ragged"
OTHERS = "hqq-3bit-others-qwen2"


def number(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.float32 if isinstance(value, float) else torch.int32)


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("axis", number(2), "axis' is 2.0, expected 0 or 1"),
        ("axis", number(0), r"scale' has shape \[64, 1\], expected \[1, 64\]"),
        ("quant_zero", number(1), "quant_zero is on"),
        ("channel_wise", number(0), "channel_wise is off"),
        ("shape", torch.tensor([64, 32]), r"shape' holds \[64, 32\], expected \[64, 64\]"),
        ("nbits", number(7), "nbits' is 7"),
        ("nbits", number(2.5), "nbits' is 2.5"),
        ("nbits", number(float("nan")), "nbits' is nan"),
        ("group_size", number(0), "group_size' is 0"),
        ("group_size", number(48), "group_size' is 48, which does not divide 64 x 64"),
        ("group_size", number(1 << 30), "group_size"),
        ("axis", torch.tensor([1, 1]), r"axis' has shape \[2\], expected \[\]"),
        ("nbits", None, "no tensor '.*nbits'"),
        ("scale", torch.full((64, 1), torch.inf), "scale' holds .*not finite"),
        ("zero", torch.ones(64, 2), r"zero' has shape \[64, 2\], expected \[64, 1\]"),
        ("W_q", torch.zeros(16, 64, dtype=torch.uint8), r"W_q' has shape \[16, 64\], expected \[32, 64\]"),
        ("W_q", torch.zeros(32, 64, dtype=torch.int32), r"W_q' has shape \[32, 64\], expected \[32, 16\]"),
    ],
)
def test_settings_and_tensors_that_do_not_fit_are_named(
    part: str, tensor: Tensor | None, message: str, tmp_path: Path
) -> None:
    source = Source(changed(PLAIN, tmp_path, {f"{QUERY}.{part}": tensor}))
    with pytest.raises(CheckpointError, match=message):
        read_config({}).linear(source, QUERY, (64, 64), bias=False)


def test_codes_beyond_their_width_are_refused(tmp_path: Path) -> None:
    """5 and 6 bits are stored as bytes: a larger one would spill into its neighbour once packed."""
    layer = "model.layers.0.self_attn.v_proj"  # 5 bits, groups of 32
    source = Source(changed(OTHERS, tmp_path, {f"{layer}.W_q": torch.full((64, 32), 32, dtype=torch.uint8)}))
    with pytest.raises(CheckpointError, match="codes beyond 5 bits"):
        read_config({}).linear(source, layer, (32, 64), bias=True)


def test_layers_are_known_without_a_config(tmp_path: Path) -> None:
    """hqq's own save function leaves config.json as it was."""
    form, _ = reader(changed(PLAIN, tmp_path, {}))
    assert form.name == "hqq"


def test_axis_0_is_dense_in_the_dtype_of_its_scales() -> None:
    """Bug: 32 bits of memory for what the tool itself holds in 16, or groups of axis 0 read along the inputs."""
    layer = "model.layers.0.self_attn.q_proj"  # 4 bits, groups of 64 outputs: one scale for a column
    source = Source(FIXTURES / "hqq-axis0-others-qwen2")
    (term,) = read_config({}).linear(source, layer, (64, 64), bias=True).terms
    assert (term.family, term.bits) == ("dense", 16)
    scale, weight = source.tensor(f"{layer}.scale").double(), term.dequantize().double()  # [1, 64], [64, 64]
    assert int((weight / scale).diff(dim=0).round().abs().max()) <= 15
    assert all(len(column.unique()) <= 16 for column in weight.T)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(FormatRefused, match="lora"):
        read_config({"quant_method": "hqq", "lora": {"rank": 4}})
