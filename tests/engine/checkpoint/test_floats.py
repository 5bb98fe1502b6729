"""Readers of floats of 8 and 4 bits (fp8, ModelOpt, MXFP4): what their configs may say, and tensors that do not fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.checkpoint import fp8, modelopt, mxfp4
from engine.checkpoint.errors import FormatRefused, TensorError
from engine.checkpoint.format import Format, detect
from engine.checkpoint.source import Source
from kernels.linear.fp8.layout import Fp8Weights
from kernels.linear.rounding import Rounding
from kernels.linear.transforms import Diagonal
from tests.engine.checkpoint.worlds import FIXTURES, QUERY, changed, expected, quantization_config

BLOCKS, NVFP4 = "hf-fp8-block", "modelopt-nvfp4"
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def written(folder: Path, tensors: dict[str, Tensor]) -> Source:
    save_file(tensors, folder / "model.safetensors")
    return Source(folder)


def rounding_of(form: Format, source: Source, shape: tuple[int, int]) -> Rounding:
    (rounding,) = form.linear(source, "l", shape, bias=False).pre
    assert isinstance(rounding, Rounding)
    return rounding


@pytest.mark.parametrize("stored", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("given", ["activation_scale", "input_scale"])
def test_one_scale_for_a_tensor_under_the_names_of_both_tools(stored: str, given: str, tmp_path: Path) -> None:
    """AutoFP8 and transformers name the scales differently; a fixed input scale must not be taken for none."""
    weight = torch.tensor([[1.0, -2.0], [448.0, 0.5]]).to(torch.float8_e4m3fn)
    tensors = {"l.weight": weight, f"l.{stored}": torch.tensor(0.25), f"l.{given}": torch.tensor([0.5])}
    form, source = fp8.read_config({"activation_scheme": "static"}), written(tmp_path, tensors)
    assert torch.equal(form.linear(source, "l", (2, 2), False).dequantize(), weight.float() * 0.25)
    assert rounding_of(form, source, (2, 2)).scale == torch.tensor([0.5])
    source.check_all_read()


def test_powers_of_two_round_activations_by_powers_of_two(tmp_path: Path) -> None:
    """DeepSeek-V3.1 sets scale_fmt: weights look the same, and activations are rounded to other values."""
    weight = torch.ones(2, 2).to(torch.float8_e4m3fn)
    tensors = {"l.weight": weight, "l.weight_scale_inv": torch.full((1, 1), 2.0).to(torch.float8_e8m0fnu)}
    form = fp8.read_config({"weight_block_size": [128, 128], "scale_fmt": "ue8m0", "fmt": "e4m3"})
    source = written(tmp_path, tensors)
    assert torch.equal(form.linear(source, "l", (2, 2), False).dequantize(), torch.full((2, 2), 2.0))
    x = torch.tensor([[449.0, 17.0]])  # the scale is 2: 17 / 2 = 8.5 lies between 8 and 9, and 224.5 at 224
    assert rounding_of(form, source, (2, 2)).apply(x).tolist() == [[448.0, 16.0]]


@pytest.mark.parametrize(
    ("fixture", "part", "tensor", "message"),
    [
        (BLOCKS, "weight_scale_inv", torch.ones(1, 2), r"weight_scale_inv' has shape \[1, 2\], expected \[2, 2\]"),
        (BLOCKS, "weight_scale_inv", torch.full((2, 2), torch.nan), "weight_scale_inv' holds scales that are not fin"),
        (BLOCKS, "weight_scale_inv", None, r"weight' has dtype float8_e4m3fn, expected float32"),
        (BLOCKS, "weight", torch.full((64, 64), torch.nan).to(torch.float8_e4m3fn), "weight: weight holds NaN"),
        (BLOCKS, "weight", torch.ones(64, 64), r"weight' has dtype float32, expected float8_e4m3fn"),
        (NVFP4, "weight", torch.zeros(64, 31, dtype=torch.uint8), r"weight' has shape \[64, 31\], expected \[64, 32\]"),
        (NVFP4, "weight_scale_2", torch.tensor(0.0), "weight_scale_2' is 0.0, expected a positive scale"),
        (NVFP4, "weight_scale", torch.full((64, 4), torch.nan).to(torch.float8_e4m3fn), "weight_scale' holds scales"),
        (NVFP4, "input_scale", None, "no tensor '.*input_scale'"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    fixture: str, part: str, tensor: Tensor | None, message: str, tmp_path: Path
) -> None:
    """Damaged scales would end in a model that says nothing but NaN."""
    source = Source(changed(fixture, tmp_path, {f"{QUERY}.{part}": tensor}))
    config = {"quantization_config": quantization_config(fixture)}
    with pytest.raises(TensorError, match=message):
        detect(config, source).linear(source, QUERY, (64, 64), bias=False)


@pytest.mark.parametrize(
    ("read", "config", "message"),
    [
        (fp8.read_config, {"activation_scheme": "none"}, "activation_scheme"),
        (fp8.read_config, {"weight_block_size": [0, 128]}, "weight_block_size"),
        (fp8.read_config, {"fmt": "e5m2"}, "fmt"),
        (fp8.read_config, {"modules_to_convert": ["embed"]}, "modules_to_convert"),
        (modelopt.read_config, {"quant_algo": "W4A8_AWQ"}, "W4A8_AWQ"),
        (modelopt.read_config, {"quant_algo": "NVFP4", "group_size": 32}, "group_size"),
        (modelopt.read_config, {}, "quant_algo"),
        (modelopt.read_config, {"quant_algo": "MIXED_PRECISION"}, "MIXED_PRECISION"),
        (mxfp4.read_config, {"bits": 4}, "bits"),
    ],
)
def test_settings_that_are_not_honoured_are_refused_by_name(read: Any, config: dict[str, Any], message: str) -> None:
    """They change what the tensors mean."""
    with pytest.raises(FormatRefused, match=message):
        read(config)


def test_modelopt_is_found_by_the_file_beside_the_model(tmp_path: Path) -> None:
    """Releases before 0.29 left config.json alone."""
    shutil.copy(FIXTURES / NVFP4 / "model.safetensors", tmp_path)
    beside = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(beside))
    source = Source(tmp_path)
    read = detect({}, source).linear(source, QUERY, (64, 64), bias=False)
    assert torch.equal(read.dequantize(), expected(FIXTURES / NVFP4)[QUERY])


def test_mixed_precision_is_looked_up_layer_by_layer(tmp_path: Path) -> None:
    """NVFP4 where FP8 is stored would read scales of another kind."""
    weight = torch.ones(2, 2).to(torch.float8_e4m3fn)
    parts = {"weight": weight, "weight_scale": torch.tensor(2.0), "input_scale": torch.tensor(1.0)}
    source = written(tmp_path, {f"{layer}.{part}": t.clone() for layer in ("l", "m") for part, t in parts.items()})
    form = modelopt.read_config({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"l": {"quant_algo": "FP8"}}})
    assert isinstance(form.linear(source, "l", (2, 2), False).terms[0], Fp8Weights)
    with pytest.raises(FormatRefused, match="m is quantized, but quantized_layers"):
        form.linear(source, "m", (2, 2), False)


def test_scales_of_awq_come_before_the_rounding(tmp_path: Path) -> None:
    """Rounded first, the large channels that AWQ makes small would keep their error."""
    scale = torch.linspace(0.5, 2, 64)
    source = Source(changed(NVFP4, tmp_path, {f"{QUERY}.pre_quant_scale": scale}))
    form = modelopt.read_config(quantization_config(NVFP4) | {"quant_algo": "NVFP4_AWQ"})
    scaled, rounded = form.linear(source, QUERY, (64, 64), bias=False).pre
    assert isinstance(scaled, Diagonal)
    assert torch.equal(scaled.scale, scale)
    assert isinstance(rounded, Rounding)


def test_mxfp4_blocks_are_nibbles_times_powers_of_two(tmp_path: Path) -> None:
    """The definition, code by code: 96 channels, so that the third group's scale is used."""
    random = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (2, 96), generator=random)
    exponents = torch.tensor([[127, 120, 130], [126, 127, 128]], dtype=torch.uint8)
    blocks = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8).view(2, 3, 16)
    source = written(tmp_path, {"l.weight_blocks": blocks, "l.weight_scales": exponents})
    weight = mxfp4.read_config({"quant_method": "mxfp4"}).linear(source, "l", (2, 96), False).dequantize()
    for n in range(2):
        for k in range(96):
            code = int(codes[n, k])
            value = E2M1[code & 7] * (-1 if code & 8 else 1)
            assert float(weight[n, k]) == value * 2.0 ** (int(exponents[n, k // 32]) - 127)


def test_mxfp4_experts_are_refused(tmp_path: Path) -> None:
    source = written(tmp_path, {"m.experts.down_proj_blocks": torch.zeros(1, dtype=torch.uint8)})
    with pytest.raises(FormatRefused, match="mixtures of experts"):
        mxfp4.read_config({}).linear(source, "l", (2, 32), False)
