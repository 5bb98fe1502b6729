"""compressed-tensors beyond packed integers: activations, rotations, cache scales, and tensors that do not fit."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.checkpoint.compressed_tensors import read_config
from engine.checkpoint.compressed_transforms import hadamard
from engine.checkpoint.errors import FormatRefused, TensorError
from engine.checkpoint.source import Source
from kernels.linear.affine.layout import AffineWeights
from kernels.linear.int8.layout import Int8Weights
from kernels.linear.rounding import Rounding
from kernels.linear.transforms import BlockRotation, Hadamard
from tests.engine.checkpoint.worlds import DOWN, FIXTURES, QUERY, changed, expected, quantization_config, stored

INT8, STATIC, BLOCKS, NVFP4, MXFP4 = "ct-int8-token", "ct-int8-static-asym", "ct-fp8-block", "ct-nvfp4", "ct-mxfp4"
ROTATED, QUIP, CACHE = "ct-hadamard-r4", "ct-quip-random", "ct-fp8-static-kv"


def config(fixture: str, part: str | None = None, **settings: Any) -> dict[str, Any]:
    """The fixture's config with settings of the first group, or of its `part`, replaced."""
    made = copy.deepcopy(quantization_config(fixture))
    group = made["config_groups"]["group_0"]
    (group[part] if part else group).update(settings)
    return made


def test_integer_activations_make_an_integer_layer() -> None:
    """Read as plain 8-bit weights the layer would still talk, with activations it was not calibrated for."""
    read = read_config(config(INT8)).linear(Source(FIXTURES / INT8), QUERY, (64, 64), bias=False)
    (term,) = read.terms
    assert isinstance(term, Int8Weights)
    assert (term.rounding.grid, term.rounding.channels, term.rounding.scale) == ("int", None, None)
    assert read.pre == ()


def test_bytes_without_rounded_activations_are_affine() -> None:
    """Weight-only int-quantized layers have nothing to round."""
    form = read_config(config(INT8, input_activations=None))
    read = form.linear(Source(FIXTURES / INT8), QUERY, (64, 64), bias=False)
    assert isinstance(read.terms[0], AffineWeights)
    assert torch.equal(read.dequantize().half(), expected(FIXTURES / INT8)[QUERY])


def test_the_layout_of_old_releases_is_told_by_the_type() -> None:
    """naive-quantized was one name for integers and for floats."""
    for fixture in (INT8, BLOCKS):
        form = read_config(config(fixture, format="naive-quantized"))
        read = form.linear(Source(FIXTURES / fixture), QUERY, (64, 64), bias=False)
        assert torch.equal(read.dequantize().half(), expected(FIXTURES / fixture)[QUERY])


def test_a_block_may_be_written_as_text() -> None:
    """Releases before 0.10 wrote "32x32"."""
    form = read_config(config(BLOCKS, "weights", block_structure="32x32"))
    assert form.describe() == "compressed-tensors fp8 32x32 with 8-bit float activations"


@pytest.mark.parametrize(
    ("fixture", "part", "settings", "message"),
    [
        (INT8, "input_activations", {"strategy": "tensor"}, "input_activations: strategy 'tensor' with dynamic = True"),
        (INT8, "input_activations", {"dynamic": False}, "strategy 'token' with dynamic = False"),
        (INT8, "input_activations", {"num_bits": 6}, "6 bits of type 'int'"),
        (INT8, "input_activations", {"strategy": "group"}, "positive group_size"),
        (BLOCKS, "input_activations", {"symmetric": False}, "symmetric"),
        (BLOCKS, "weights", {"block_structure": [32]}, "block_structure"),
        (BLOCKS, "weights", {"block_structure": "32x\u00b2"}, "block_structure"),
        (BLOCKS, "weights", {"symmetric": False}, "symmetric"),
        (NVFP4, "weights", {"num_bits": 8}, "nvfp4-pack-quantized weights of 8 bits"),
        (NVFP4, "weights", {"strategy": "channel"}, "strategy 'channel'"),
        (INT8, None, {"format": "sparse-24-bitmask"}, "sparse-24-bitmask"),
    ],
)
def test_settings_that_are_not_honoured_are_refused_by_name(
    fixture: str, part: str | None, settings: dict[str, Any], message: str
) -> None:
    """They change what the numbers mean, or make a token depend on its neighbours."""
    with pytest.raises(FormatRefused, match=message):
        read_config(config(fixture, part, **settings))


@pytest.mark.parametrize(
    ("fixture", "part", "tensor", "message"),
    [
        (INT8, "weight", torch.zeros(64, 63, dtype=torch.int8), r"\[64, 63\], expected \[64, 64\]"),
        (INT8, "weight_scale", torch.full((64, 1), torch.inf), "weight_scale' holds scales that are not finite"),
        (INT8, "weight", torch.zeros(64, 64), "dtype float32, expected int8"),
        (STATIC, "input_scale", torch.tensor([0.0]), "input_scale' is 0.0, expected a positive scale"),
        (STATIC, "input_zero_point", None, "no tensor '.*input_zero_point'"),
        ("ct-w4a8-g32", "weight", torch.full((64, 64), 8, dtype=torch.int8), "weight'.*beyond the range of 4 bits"),
        (BLOCKS, "weight_scale", torch.ones(2, 3), r"\[2, 3\], expected \[2, 2\]"),
        (BLOCKS, "weight", torch.full((64, 64), torch.nan).to(torch.float8_e4m3fn), "weight': weight holds NaN"),
        (NVFP4, "weight_global_scale", torch.tensor([torch.nan]), "weight_global_scale' holds scales"),
        (NVFP4, "weight_packed", torch.zeros(64, 16, dtype=torch.uint8), r"\[64, 16\], expected \[64, 32\]"),
        (MXFP4, "weight_scale", torch.full((64, 2), 255, dtype=torch.uint8), "weight_scale' holds scales that are NaN"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    fixture: str, part: str, tensor: Tensor | None, message: str, tmp_path: Path
) -> None:
    """A NaN among the scales would end in a model that says nothing, without a word of why."""
    folder = changed(fixture, tmp_path, {f"{QUERY}.{part}": tensor})
    with pytest.raises(TensorError, match=message):
        read_config(config(fixture)).linear(Source(folder), QUERY, (64, 64), bias=False)


def test_widths_packed_in_a_way_that_the_shape_does_not_tell_are_refused(tmp_path: Path) -> None:
    """20 codes of 3 bits take two words in old and in new releases, in other places: a guess is wrong half the time."""
    tensors = {
        "l.weight_packed": torch.zeros(4, 2, dtype=torch.int32),
        "l.weight_scale": torch.ones(4, 1),
        "l.weight_shape": torch.tensor([4, 20]),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    form = read_config(config("ct-8bit-channel-bf16", "weights", num_bits=3))
    with pytest.raises(TensorError, match="20 codes of 3 bits take 2 words in older releases"):
        form.linear(Source(tmp_path), "l", (4, 20), bias=False)


def test_cache_scales_are_left_and_told() -> None:
    """They would otherwise be tensors that the model does not use, which is an error."""
    form, source = read_config(config(CACHE)), Source(FIXTURES / CACHE)
    assert "scales of a quantized KV cache are not used" in form.describe()
    form.linear(source, "model.layers.0.self_attn.k_proj", (32, 64), bias=False)
    assert not any("self_attn.k_scale" in name or "self_attn.v_scale" in name for name in source.unread())


def test_the_deterministic_rotation_is_the_fast_one(tmp_path: Path) -> None:
    """Stored or not; a whole matrix product in its place costs 32 times the additions."""
    name = f"{DOWN}.R4_input.weight"
    form = read_config(config(ROTATED))
    for folder in (FIXTURES / ROTATED, changed(ROTATED, tmp_path, {name: None})):
        (rotation,) = form.linear(Source(folder), DOWN, (64, 96), bias=False).pre
        assert rotation == Hadamard(32)
    assert torch.allclose(stored(ROTATED, name).double() / 32**0.5, hadamard(32))


def test_a_random_rotation_that_is_not_stored_is_an_error(tmp_path: Path) -> None:
    """Leaving it out, or drawing another one, gives fluent nonsense."""
    name = f"{QUERY}.v_input.weight"
    with pytest.raises(TensorError, match="q_proj: the checkpoint stores no matrix for its transform 'v'"):
        read_config(config(QUIP)).linear(Source(changed(QUIP, tmp_path, {name: None})), QUERY, (64, 64), bias=False)
    zeros = {name: torch.zeros(stored(QUIP, name).shape)}
    with pytest.raises(TensorError, match=r"v_input\.weight' is not sqrt"):
        read_config(config(QUIP)).linear(Source(changed(QUIP, tmp_path, zeros)), QUERY, (64, 64), bias=False)


def test_the_bias_turns_with_the_output(tmp_path: Path) -> None:
    """The tool rotates W x + b; ours adds the bias behind the rotation."""
    bias = torch.linspace(-1, 1, 64)
    folder = changed(QUIP, tmp_path, {f"{QUERY}.bias": bias})
    read = read_config(config(QUIP)).linear(Source(folder), QUERY, (64, 64), bias=True)
    (rotation,) = read.post
    assert isinstance(rotation, BlockRotation)
    assert read.bias is not None
    assert torch.equal(read.bias, rotation.apply(bias.unsqueeze(0))[0])


def test_rotations_come_before_the_rounding() -> None:
    """Outliers are rotated away so that what is rounded has none."""
    made = config(ROTATED, input_activations={"num_bits": 8, "strategy": "token", "dynamic": True})
    rotation, rounding = read_config(made).linear(Source(FIXTURES / ROTATED), DOWN, (64, 96), bias=False).pre
    assert isinstance(rotation, Hadamard)
    assert isinstance(rounding, Rounding)
