"""compressed-tensors: which group holds for a layer, what the config may say, and tensors that do not fit it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.compressed_tensors import read_config
from engine.checkpoint.errors import FormatRefused, TensorError
from engine.checkpoint.source import Source
from kernels.linear.affine.layout import AffineWeights
from tests.engine.checkpoint.worlds import DOWN, FIXTURES, QUERY, changed, expected, quantization_config, stored

R3 = {"targets": ["re:.*self_attn$"], "location": "q_attn"}
SYMMETRIC, ASYMMETRIC, MIXED = "ct-4bit-sym-g32", "ct-4bit-asym-g32", "ct-mixed-groups-qwen2"


def config(fixture: str = SYMMETRIC, weights: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """The fixture's config with settings of the first group's weights, of the group, or at the top replaced."""
    made = copy.deepcopy(quantization_config(fixture))
    group = made["config_groups"]["group_0"]
    group["weights"] |= weights or {}
    for name, value in settings.items():
        (group if name in group and name != "format" else made)[name] = value
    return made


def affine(fixture: str, layer: str, shape: tuple[int, int]) -> AffineWeights:
    """The only term of a layer without bias."""
    (term,) = read_config(quantization_config(fixture)).linear(Source(FIXTURES / fixture), layer, shape, False).terms
    assert isinstance(term, AffineWeights)
    return term


def test_symmetric_zero_points_take_no_memory() -> None:
    """All are the middle of the range; storing one for each group would be read at every token."""
    term = affine(SYMMETRIC, QUERY, (64, 64))
    assert set(term.zeros.flatten().tolist()) == {8}
    assert term.zeros.stride() == (0, 0)


def test_even_layers_are_served_from_the_file() -> None:
    """The packed rows are the canonical stream: copying them would need the memory twice while loading."""
    source = Source(FIXTURES / SYMMETRIC)
    (term,) = read_config(config()).linear(source, QUERY, (64, 64), bias=False).terms
    assert isinstance(term, AffineWeights)
    assert term.codes.data_ptr() == source.tensor(f"{QUERY}.weight_packed").data_ptr()


@pytest.mark.parametrize(
    ("targets", "ignore"),
    [
        (["Linear"], ["lm_head"]),
        (["re:.*_proj$"], []),
        ([QUERY], None),
        (["Linear"], ["re:.*lm_head", "re:model.*down"]),
    ],
)
def test_targets_by_class_pattern_and_name(targets: list[str], ignore: list[str] | None) -> None:
    """A layer that is targeted but read as dense ends in a missing `weight`."""
    form = read_config(config(targets=targets, ignore=ignore))
    source = Source(FIXTURES / SYMMETRIC)
    read = form.linear(source, QUERY, (64, 64), bias=False)
    assert torch.equal(read.dequantize().half(), expected(FIXTURES / SYMMETRIC)[QUERY])
    if ignore:
        assert form.linear(source, "lm_head", (96, 64), bias=False).describe() == "float16"


def test_a_name_beats_a_pattern_beats_the_class() -> None:
    """Groups overlap: "Linear" beside a pattern for the layers that need more bits."""
    base = config()
    first = base["config_groups"]["group_0"]
    for number, (target, bits) in enumerate([("re:.*q_proj", 2), (QUERY, 4)], start=1):
        base["config_groups"][f"group_{number}"] = {
            **first,
            "targets": [target],
            "weights": {**first["weights"], "num_bits": bits},
        }
    first["weights"]["num_bits"] = 8
    form, source = read_config(base), Source(FIXTURES / SYMMETRIC)
    assert form.linear(source, QUERY, (64, 64), bias=False).describe() == "4-bit g32"
    with pytest.raises(TensorError, match=r"\[64, 12\], expected \[64, 24\]"):
        form.linear(source, DOWN, (64, 96), bias=False)


@pytest.mark.parametrize("ignored", [QUERY, "re:.*self_attn.*"])
def test_files_that_contradict_the_ignore_list_are_refused(ignored: str) -> None:
    """Reading the layer as dense would fail on a missing tensor and blame the file."""
    with pytest.raises(FormatRefused, match="ignored"):
        read_config(config(ignore=[ignored])).linear(Source(FIXTURES / SYMMETRIC), QUERY, (64, 64), bias=False)


def test_an_unset_group_index_means_channels_in_order(tmp_path: Path) -> None:
    """llm-compressor registers weight_g_idx filled with -1 before it knows the order."""
    unset = torch.full((64,), -1, dtype=torch.int32)
    folder = changed(ASYMMETRIC, tmp_path, {f"{QUERY}.weight_g_idx": unset})
    read = read_config(quantization_config(ASYMMETRIC)).linear(Source(folder), QUERY, (64, 64), bias=False)
    assert torch.equal(read.dequantize().half(), expected(folder)[QUERY])


def test_zero_points_of_old_releases_are_not_packed(tmp_path: Path) -> None:
    """Releases before 0.9 stored signed int8 zero points, one for each group."""
    term = affine(ASYMMETRIC, QUERY, (64, 64))
    signed = (term.zeros.short() - 8).to(torch.int8)  # [out, groups]
    folder = changed(ASYMMETRIC, tmp_path, {f"{QUERY}.weight_zero_point": signed})
    read = read_config(quantization_config(ASYMMETRIC)).linear(Source(folder), QUERY, (64, 64), bias=False)
    assert torch.equal(read.dequantize().half(), expected(folder)[QUERY])


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("weight_packed", None, r"no tensor '.*q_proj\.weight_packed'"),
        ("weight_packed", torch.zeros(64, 4, dtype=torch.int32), r"\[64, 4\], expected \[64, 8\]"),
        ("weight_scale", torch.ones(64, 1), r"weight_scale' has shape \[64, 1\], expected \[64, 2\]"),
        ("weight_zero_point", None, r"no tensor '.*weight_zero_point'"),
        ("weight_zero_point", torch.full((64, 2), 9, dtype=torch.int8), "beyond the 4-bit range"),
        ("weight_shape", torch.tensor([64, 63]), r"weight_shape' holds \[64, 63\], expected \[64, 64\]"),
        ("weight_g_idx", torch.zeros(64, dtype=torch.int32), "weight_g_idx' does not put 32"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    part: str, tensor: torch.Tensor | None, message: str, tmp_path: Path
) -> None:
    """A wrong shape must not end as a reshape error deep in a kernel, nor, worse, broadcast."""
    folder = changed(ASYMMETRIC, tmp_path, {f"{QUERY}.{part}": tensor})
    with pytest.raises(TensorError, match=message):
        read_config(quantization_config(ASYMMETRIC)).linear(Source(folder), QUERY, (64, 64), bias=False)


@pytest.mark.parametrize(
    ("changed_config", "message"),
    [
        (config(input_activations={"num_bits": 8, "dynamic": True}), "input_activations"),
        (config(output_activations={"num_bits": 8}), "output_activations"),
        (config(weights={"num_bits": 9}), "9 bits"),
        (config(weights={"type": "float"}), "float"),
        (config(weights={"dynamic": True}), "dynamic"),
        (config(weights={"strategy": "block", "block_structure": [128, 128]}), "block"),
        (config(weights={"group_size": None}), "group_size"),
        (config(transform_config={"config_groups": {"R3": {"type": "givens", "apply": []}}}), "R3.*givens"),
        (config(transform_config={"config_groups": {"R3": {"type": "hadamard", "apply": [R3]}}}), "R3.*q_attn.*keys"),
        (config(transform_config={"version": 2}), "version"),
        (config(sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24-bitmask"),
        (config(targets=["re:("]), "regular expression"),
        (config(targets=["re:a{99999999999999999999}"]), "regular expression"),
        (config(targets=["re:" + "(" * 5000]), "regular expression"),
        (config() | {"config_groups": {"W4A16": ["Linear"]}}, "config_groups"),
    ],
)
def test_settings_that_are_not_honoured_are_refused_by_name(changed_config: dict[str, Any], message: str) -> None:
    """Quantized activations, rotations and sparse layouts change the result or the files."""
    with pytest.raises(FormatRefused, match=message):
        read_config(changed_config)


@pytest.mark.parametrize("layout", ["float-quantized", "marlin-24", "nvfp4-pack-quantized"])
def test_other_formats_are_refused_by_name(layout: str) -> None:
    """The method has a dozen layouts; the group's own format wins over the global one."""
    made = config()
    made["config_groups"]["group_0"]["format"] = layout
    with pytest.raises(FormatRefused, match=layout):
        read_config(made)


def test_a_dense_sparsity_config_is_no_obstacle() -> None:
    """Many published checkpoints carry the measured sparsity of a dense model."""
    assert read_config(config(sparsity_config={"format": "dense", "global_sparsity": 0.14})).describe().endswith("g32")


def test_a_tensor_has_one_scale_and_one_zero_point() -> None:
    """Strategy "tensor" stores shape [1], and its zero point unpacked."""
    assert stored(MIXED, "model.layers.0.self_attn.o_proj.weight_zero_point").dtype == torch.int8
    term = affine(MIXED, "model.layers.0.self_attn.o_proj", (64, 64))
    assert len(set(term.scales.flatten().tolist())) == len(set(term.zeros.flatten().tolist())) == 1
