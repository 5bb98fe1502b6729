"""GPTQ: what the config may say, and tensors that do not fit it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.errors import FormatRefused, TensorError
from engine.checkpoint.gptq import read_config
from engine.checkpoint.source import Source
from kernels.linear.affine.layout import AffineWeights
from tests.engine.checkpoint.worlds import DOWN, FIXTURES, QUERY, changed, quantization_config, stored

RAGGED = "gptq-v1-4bit-ragged"
PLAIN = {"quant_method": "gptq", "bits": 4, "group_size": 32}


def test_zero_points_borrow_from_their_neighbours() -> None:
    """v1 subtracts 1 from whole words: the query rows 3..6 with zero point 0 are stored as 15, 14, 14, 14.

    Adding 1 field by field, as many loaders do, would give 0, 15, 15, 15 and push these rows far off.
    """
    fields = (stored(RAGGED, f"{QUERY}.qzeros")[0, 0] >> torch.arange(0, 32, 4)) & 15
    assert fields[3:7].tolist() == [15, 14, 14, 14]
    source = Source(FIXTURES / RAGGED)
    (term,) = read_config(quantization_config(RAGGED)).linear(source, QUERY, (64, 64), bias=False).terms
    assert isinstance(term, AffineWeights)
    assert term.zeros[3:7, 0].tolist() == [0, 0, 0, 0]


def test_the_last_group_may_be_short() -> None:
    """80 inputs in groups of 32 have 3 groups, not 2."""
    source = Source(FIXTURES / RAGGED)
    (term,) = read_config(quantization_config(RAGGED)).linear(source, DOWN, (64, 80), bias=False).terms
    assert isinstance(term, AffineWeights)
    assert (term.num_groups, term.group_size) == (3, 32)


def test_a_missing_g_idx_means_channels_in_order(tmp_path: Path) -> None:
    """Some tools leave the sequential g_idx away."""
    folder = changed(RAGGED, tmp_path, {f"{QUERY}.g_idx": None})
    form = read_config(PLAIN)
    without = form.linear(Source(folder), QUERY, (64, 64), bias=False)
    assert torch.equal(
        without.dequantize(), form.linear(Source(FIXTURES / RAGGED), QUERY, (64, 64), False).dequantize()
    )


def test_a_bias_of_zeros_nobody_asked_for_is_dropped(tmp_path: Path) -> None:
    """AutoGPTQ gives every layer a bias of zeros; refusing it would refuse most old checkpoints."""
    folder = changed(RAGGED, tmp_path, {f"{QUERY}.bias": torch.zeros(64, dtype=torch.float16)})
    source = Source(folder)
    assert read_config(PLAIN).linear(source, QUERY, (64, 64), bias=False).bias is None
    assert f"{QUERY}.bias" not in source.unread()


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("qweight", None, "neither .*qweight nor .*weight"),
        ("qzeros", None, r"no tensor '.*q_proj\.qzeros'"),
        ("qweight", torch.zeros(4, 64, dtype=torch.int32), r"qweight' has shape \[4, 64\], expected \[8, 64\]"),
        ("qweight", torch.zeros(8, 64, dtype=torch.int64), "qweight' has dtype int64, expected int32"),
        ("qzeros", torch.zeros(2, 7, dtype=torch.int32), r"qzeros' has shape \[2, 7\], expected \[2, 8\]"),
        ("scales", torch.ones(1, 64), r"scales' has shape \[1, 64\], expected \[2, 64\]"),
        ("scales", torch.ones(2, 64, dtype=torch.float64), "scales' has dtype float64"),
        ("g_idx", torch.zeros(63, dtype=torch.int32), r"g_idx' has shape \[63\], expected \[64\]"),
        ("g_idx", torch.zeros(64, dtype=torch.int32), "g_idx' does not put 32 input channels"),
        ("bias", torch.ones(64, dtype=torch.float16), "bias' is not zero"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    part: str, tensor: torch.Tensor | None, message: str, tmp_path: Path
) -> None:
    """A wrong shape must not end as a reshape error deep in a kernel, nor, worse, broadcast."""
    folder = changed(RAGGED, tmp_path, {f"{QUERY}.{part}": tensor})
    with pytest.raises(TensorError, match=message):
        read_config(PLAIN).linear(Source(folder), QUERY, (64, 64), bias=False)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"bits": 5}, "5 bits.*'gptq_p'"),
        ({"bits": 9}, "9"),
        ({"bits": "4"}, "bits"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": -2}, "group_size"),
        ({"checkpoint_format": "marlin"}, "marlin"),
        ({"checkpoint_format": "bitblas"}, "bitblas"),
        ({"checkpoint_format": "gptq_v2", "format": "gptq"}, "contradicts"),
        ({"is_marlin_format": True}, "is_marlin_format"),
        ({"pack_dtype": "int64"}, "pack_dtype"),
        ({"rotation": "hadamard"}, "rotation"),
        ({"adapter": {"name": "lora"}}, "adapter"),
        ({"dynamic": {"-:(": {}}}, "regular expression"),
        ({"dynamic": {"a{99999999999999999999}": {}}}, "regular expression"),
        ({"dynamic": {"(" * 5000: {}}}, "regular expression"),
        ({"dynamic": {"lm_head": {"bits": 7}}}, "7 bits.*'gptq_p'"),
        ({"dynamic": {"lm_head": {"adapter": {"rank": 8}}}}, "adapter"),
        ({"dynamic": {"lm_head": {"group_size": 0}}}, "group_size"),
    ],
)
def test_settings_that_are_not_honoured_are_refused_by_name(setting: dict[str, Any], message: str) -> None:
    """A setting that is ignored serves other weights than the tool meant."""
    with pytest.raises(FormatRefused, match=message):
        read_config(PLAIN | setting)


def test_settings_about_the_making_are_no_obstacle() -> None:
    """Configs of transformers and optimum list the calibration data; of AutoGPTQ, the model's origin."""
    form = read_config(
        PLAIN
        | {
            "dataset": "c4",
            "damp_percent": 0.1,
            "is_marlin_format": False,
            "adapter": None,
            "format": "gptq",
            "checkpoint_format": None,
        }
    )
    assert form.describe() == "GPTQ 4-bit g32"


def test_dynamic_rules_are_tried_in_order(tmp_path: Path) -> None:
    """The first pattern that matches decides; a later, wider one must not widen the layer."""
    form = read_config(
        PLAIN | {"dynamic": {"+:.*q_proj": {"bits": 8, "mse": 2.4}, "-:.*attn.*": {}, ".*mlp.*": {"group_size": 64}}}
    )
    source = Source(FIXTURES / RAGGED)
    with pytest.raises(TensorError, match=r"qweight' has shape \[8, 64\], expected \[16, 64\]"):
        form.linear(source, QUERY, (64, 64), bias=False)
    with pytest.raises(FormatRefused, match=r"k_proj\.qweight.*dynamic"):
        form.linear(source, "model.layers.0.self_attn.k_proj", (32, 64), bias=False)
    with pytest.raises(TensorError, match=r"qzeros' has shape \[3, 8\], expected \[2, 8\]"):
        form.linear(source, DOWN, (64, 80), bias=False)


def test_planes_hold_32_codes(tmp_path: Path) -> None:
    """Bug: a layer whose outputs do not fill the planes, read as if its words were those of another layout."""
    source = Source(changed(RAGGED, tmp_path, {}))
    with pytest.raises(TensorError, match="64 x 80, but 3-bit planes hold 32 codes"):
        read_config(PLAIN | {"bits": 3, "format": "gptq_p"}).linear(source, DOWN, (64, 80), bias=False)
