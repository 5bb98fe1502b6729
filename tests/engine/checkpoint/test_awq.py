"""AWQ: what the config may say, and tensors that do not fit it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.awq import read_config
from engine.checkpoint.errors import FormatRefused, TensorError
from engine.checkpoint.source import Source
from tests.engine.checkpoint.worlds import QUERY, changed, expected

FIXTURE = "awq-gemm-4bit-g32"
PLAIN = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


@pytest.mark.parametrize(
    "config",
    [
        {"w_bit": 4, "q_group_size": 32, "version": "GEMM", "zero_point": True},  # AutoAWQ's quant_config.json
        PLAIN | {"modules_to_not_convert": ["o_proj"], "do_fuse": False, "exllama_config": {"version": 2}},
        PLAIN | {"backend": "autoawq"},
    ],
)
def test_the_configs_in_use_are_understood(config: dict[str, Any], tmp_path: Path) -> None:
    """Three tools name the same settings differently."""
    folder = changed(FIXTURE, tmp_path, {})
    read = read_config(config).linear(Source(folder), QUERY, (64, 64), bias=False)
    assert torch.equal(read.dequantize().half(), expected(folder)[QUERY])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"version": "marlin"}, "'marlin'.*'GEMM'"),
        ({"backend": "llm-awq"}, "llm-awq"),
        ({"bits": 8}, "8"),
        ({"zero_point": False}, "zero_point"),
        ({"group_size": 0}, "group_size"),
        ({"desc_act": True}, "desc_act"),
    ],
)
def test_other_layouts_are_refused_by_name(setting: dict[str, Any], message: str) -> None:
    """marlin and llm-awq checkpoints hold tensors of the same names in another order."""
    with pytest.raises(FormatRefused, match=message):
        read_config(PLAIN | setting)


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("scales", None, r"no tensor '.*q_proj\.scales'"),
        ("qweight", torch.zeros(8, 64, dtype=torch.int32), r"qweight' has shape \[8, 64\], expected \[64, 8\]"),
        ("qzeros", torch.zeros(1, 8, dtype=torch.int32), r"qzeros' has shape \[1, 8\], expected \[2, 8\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    part: str, tensor: torch.Tensor | None, message: str, tmp_path: Path
) -> None:
    """GPTQ's qweight has the same size and name: only its shape tells it from AWQ's."""
    folder = changed(FIXTURE, tmp_path, {f"{QUERY}.{part}": tensor})
    with pytest.raises(TensorError, match=message):
        read_config(PLAIN).linear(Source(folder), QUERY, (64, 64), bias=False)


def test_outputs_that_do_not_fill_words_are_refused(tmp_path: Path) -> None:
    """Eight outputs share a word; a model of 60 cannot have been packed so."""
    with pytest.raises(TensorError, match="60 outputs"):
        read_config(PLAIN).linear(Source(changed(FIXTURE, tmp_path, {})), QUERY, (60, 64), bias=False)
