"""AutoRound: which of its packings and settings are honoured, and for which layer."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.auto_round import read_config
from engine.checkpoint.errors import FormatRefused, TensorError
from engine.checkpoint.source import Source
from tests.engine.checkpoint.worlds import DOWN, FIXTURES, QUERY, changed, expected

PLAIN = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": "auto_round:auto_gptq"}
FIXTURE = "auto-round-gptq-4bit"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"packing_format": "auto_round:llm_compressor"}, "llm_compressor.*auto_round:auto_gptq"),
        ({"packing_format": "marlin"}, "marlin"),
        ({"bits": 16}, "no quantization"),
        ({"bits": 9}, "9"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": [128, 128]}, "group_size"),
        ({"data_type": "mx_fp"}, "mx_fp"),
        ({"act_bits": 8}, "act_bits 8"),
        ({"rotation_config": {"block_size": 32}}, "rotation_config"),
        ({"super_bits": 6}, "super_bits"),
        ({"extra_config": {"lm_head": {"bits": 11}}}, "lm_head.*11"),
        ({"extra_config": {"lm_head": {"act_bits": 4}}}, "lm_head.*act_bits 4"),
        ({"extra_config": {"lm_head": {"rotation_config": {}, "super_bits": 4}}}, "lm_head.*super_bits"),
        ({"extra_config": {"lm_head": 4}}, "extra_config"),
    ],
)
def test_settings_that_are_not_honoured_are_refused_by_name(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatRefused, match=message):
        read_config(PLAIN | setting)


def test_a_name_counts_before_a_pattern() -> None:
    """Bug: a pattern that happens to stand first widens the layer that was named."""
    extra = {"q_proj": {"bits": 8}, QUERY: {"bits": 4}, "model.layers.0.mlp": {"bits": 2}, "k_proj[": {"bits": 3}}
    form = read_config(PLAIN | {"extra_config": extra})
    source = Source(FIXTURES / FIXTURE)
    read = form.linear(source, QUERY, (64, 64), bias=False)
    assert torch.equal(read.dequantize().half(), expected(FIXTURES / FIXTURE)[QUERY])
    with pytest.raises(TensorError, match=r"qweight' has shape \[12, 64\], expected \[6, 64\]"):
        form.linear(source, DOWN, (64, 96), bias=False)


def test_a_layer_that_should_be_dense_is_refused() -> None:
    form = read_config(PLAIN | {"extra_config": {QUERY: {"bits": 16}}})
    with pytest.raises(FormatRefused, match=r"q_proj is stored as qweight.*16 bits"):
        form.linear(Source(FIXTURES / FIXTURE), QUERY, (64, 64), bias=False)


def test_zero_points_depend_on_the_packing() -> None:
    """Bug: the two packings differ in nothing but the 1 that one of them subtracts."""
    source = Source(FIXTURES / FIXTURE)
    wrong = read_config(PLAIN | {"packing_format": "auto_round:gptqmodel"}).linear(source, QUERY, (64, 64), bias=False)
    assert not torch.equal(wrong.dequantize().half(), expected(FIXTURES / FIXTURE)[QUERY])


def test_awq_of_other_widths_is_refused(tmp_path: Path) -> None:
    """AutoRound packs 5 to 7 bits in AWQ's order over several words, which no reader knows."""
    form = read_config(PLAIN | {"bits": 5, "packing_format": "auto_round:auto_awq"})
    with pytest.raises(FormatRefused, match="5 bits; AWQ packing is supported for 4 only"):
        form.linear(Source(changed(FIXTURE, tmp_path, {})), QUERY, (64, 64), bias=False)
