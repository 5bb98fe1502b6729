"""Which reader a checkpoint gets, and what is refused before any tensor is read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.checkpoint.errors import FilesError, FormatRefused, TensorError
from engine.checkpoint.format import READERS, detect
from engine.checkpoint.refused import METHODS
from engine.checkpoint.source import Source


def folder_of(tmp_path: Path, name: str = "lm_head.weight", dtype: torch.dtype = torch.bfloat16) -> Source:
    """A checkpoint of one tensor [4, 6]."""
    save_file({name: torch.arange(24).view(4, 6).to(dtype)}, tmp_path / "model.safetensors")
    return Source(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_quantization_config_means_dense(dtype: torch.dtype, tmp_path: Path) -> None:
    """Weights are served in the dtype they are stored in."""
    source = folder_of(tmp_path, dtype=dtype)
    form = detect({"model_type": "llama", "quantization_config": None}, source)
    read = form.linear(source, "lm_head", (4, 6), bias=False)
    assert (form.name, read.describe()) == ("dense", str(dtype).removeprefix("torch."))
    assert torch.equal(read.dequantize(), torch.arange(24).view(4, 6).float())


def test_dense_weights_of_other_types_are_refused(tmp_path: Path) -> None:
    """An int8 `weight` without a config is a quantized model that lost its scales."""
    source = folder_of(tmp_path, dtype=torch.int8)
    with pytest.raises(TensorError, match=r"lm_head\.weight' has dtype int8, expected float32 or float16 or bfloat16"):
        detect({}, source).linear(source, "lm_head", (4, 6), bias=False)


@pytest.mark.parametrize("method", ["unheard-of", None, 4, ["gptq"]])
def test_unknown_methods_are_refused_with_those_that_are_known(method: Any, tmp_path: Path) -> None:
    """A user who picked the wrong file must learn which one to pick."""
    with pytest.raises(FormatRefused, match=r"awq, .*, gptq, .*and unquantized") as caught:
        detect({"quantization_config": {"quant_method": method, "bits": 4}}, folder_of(tmp_path))
    assert repr(method) in str(caught.value)


@pytest.mark.parametrize("name", ["model.x.qweight", "model.x.weight_packed"])
def test_packed_tensors_without_a_config_are_explained(name: str, tmp_path: Path) -> None:
    """A download that missed quantize_config.json would end in "no tensor model.x.weight"."""
    with pytest.raises(FormatRefused, match=r"no quantization_config and there is no quantize_config\.json"):
        detect({}, folder_of(tmp_path, name, torch.int32))


def test_the_config_in_config_json_wins(tmp_path: Path) -> None:
    """GPTQModel writes both; a stale file beside must not decide."""
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 8, "group_size": 128}))
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}
    assert detect({"quantization_config": awq}, folder_of(tmp_path)).name == "awq"


@pytest.mark.parametrize("content", ["{", "[]", "null"])
def test_a_broken_file_beside_is_named(content: str, tmp_path: Path) -> None:
    """Falling through to "dense" would hide that the file was cut short."""
    (tmp_path / "quantize_config.json").write_text(content)
    with pytest.raises(FilesError, match=r"quantize_config\.json"):
        detect({}, folder_of(tmp_path))


def test_old_names_are_found(tmp_path: Path) -> None:
    """AutoAWQ wrote quant_config.json; compressed-tensors, compression_config."""
    (tmp_path / "quant_config.json").write_text(json.dumps({"w_bit": 4, "q_group_size": 64, "version": "GEMM"}))
    source = folder_of(tmp_path)
    assert detect({}, source).describe() == "AWQ 4-bit g64"
    weights = {"num_bits": 4, "strategy": "group", "group_size": 128}
    old = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    assert detect({"compression_config": old}, source).describe() == "compressed-tensors 4-bit g128"


def test_a_config_that_is_no_object_is_refused(tmp_path: Path) -> None:
    """ "quantization_config": "gptq" is a mistake, not an unquantized model."""
    with pytest.raises(FormatRefused, match="must be an object"):
        detect({"quantization_config": "gptq"}, folder_of(tmp_path))


@pytest.mark.parametrize("method", ["eetq", "exl2", "exl3", "marlin", "quanto", "spqr", "vptq", "VPTQ"])
def test_formats_that_are_known_but_not_read_say_what_to_do(method: str, tmp_path: Path) -> None:
    """ "Not supported" alone leaves a user with a download of 40 GB and no next step."""
    with pytest.raises(FormatRefused, match=f"^{method} checkpoints are not supported; .*(fetch|quantize|save)"):
        detect({"quantization_config": {"quant_method": method, "bits": 4}}, folder_of(tmp_path))


def test_quip_sharp_is_known_by_its_setting(tmp_path: Path) -> None:
    """Its config.json has no quantization_config, so that its weights would be taken for missing ones."""
    read = detect({"quip_params": {"codebook": "E8P12", "codebook_version": 1}}, folder_of(tmp_path))
    assert read.describe() == "QuIP# 2-bit"


def test_no_format_is_both_read_and_refused() -> None:
    assert not set(READERS) & set(METHODS)


def test_every_reader_says_its_method() -> None:
    """`name` is what logs and `/health` show."""
    assert set(READERS) >= {
        "auto-round",
        "awq",
        "bitnet",
        "bitsandbytes",
        "compressed-tensors",
        "gptq",
        "hqq",
        "torchao",
    }
