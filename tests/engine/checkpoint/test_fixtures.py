"""Every checkpoint of tests/fixtures, read and compared bit for bit with what the tool that wrote it computes."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.checkpoint.format import detect
from engine.checkpoint.linear import present
from engine.checkpoint.source import Source
from kernels.linear.affine.layout import AffineWeights
from kernels.linear.transforms import Permutation
from kernels.linear.weights import LinearWeights
from tests.engine.checkpoint.worlds import ALL, FIXTURES, QUERY, changed, expected, reader, stored
from tests.tolerance import assert_within

V1 = [name for name in ALL if name.startswith("gptq-v1")]
TIED = "gptq-v2-4bit-asym"
ACT_ORDER = [name for name in ALL if name.endswith("actorder")]
ROTATED = ("ct-hadamard-r4", "ct-quip-random", *(name for name in ALL if name.startswith("fp-quant")))


def test_there_are_fixtures_of_every_format() -> None:
    """A moved folder must not turn the tests below into tests of nothing."""
    assert {name.split("-")[0] for name in ALL} >= {"gptq", "awq", "ct", "bnb", "auto", "hqq", "torchao", "quip", "fp"}


def rounding(read: LinearWeights, weight: Tensor) -> Tensor:
    """How far weights may be from the tool's that are rounded in other places, [out, in] float64.

    bitsandbytes multiplies the three factors of an 8-bit weight in another order: four roundings of at most 2^-24, two
    of theirs and two of ours; so does FP-Quant with NVFP4. gemv_fast stores scale * zero in float16, and the tool's
    weights, gemm's, are float16.
    """
    (term,) = read.terms
    size = weight.abs().double()
    if not isinstance(term, AffineWeights) or term.offsets is None:
        return 2**-22 * size
    offsets = term.offsets.abs().double().repeat_interleave(term.group_size, dim=1)
    return 2**-11 * (1 + 2**-9) * (offsets + size)


@pytest.mark.parametrize("name", [name for name in ALL if not name.startswith("quip")])  # test_quip.py: no tool here
def test_weights_are_those_of_the_tool_bit_for_bit(name: str) -> None:
    """A wrong nibble order, zero point, group, or permutation gives fluent nonsense, not an error."""
    form, source = reader(FIXTURES / name)
    for layer, weight in expected(FIXTURES / name).items():
        read = form.linear(source, layer, (weight.shape[0], weight.shape[1]), f"{layer}.bias" in source)
        if name in ROTATED:  # the tool's are what is stored, between the rotations
            read = replace(read, pre=(), post=())
        if name in ("bnb-int8", "awq-gemv-fast-4bit-g32", "fp-quant-nvfp4"):
            assert_within(read.dequantize(), weight, rounding(read, weight), layer)
        else:
            assert torch.equal(read.dequantize().to(weight.dtype), weight), layer


@pytest.mark.parametrize("name", ALL)
def test_a_model_that_takes_what_it_wants_leaves_nothing(name: str) -> None:
    """A reader that forgets a tensor (g_idx, weight_shape, a bias) would make every checkpoint end in "surplus"."""
    form, source = reader(FIXTURES / name)
    shapes = {layer: (weight.shape[0], weight.shape[1]) for layer, weight in expected(FIXTURES / name).items()}
    for tensor in source.names():
        layer = tensor.removesuffix(".weight")
        if layer not in shapes and tensor.endswith("_proj.weight"):
            shapes[layer] = (source.shape(tensor)[0], source.shape(tensor)[1])
    for layer, shape in shapes.items():
        read = form.linear(source, layer, shape, f"{layer}.bias" in source)
        assert (read.out_features, read.in_features) == shape
    for tensor in source.unread():
        assert "proj" not in tensor
        source.tensor(tensor)
    source.check_all_read()


@pytest.mark.parametrize("name", V1)
def test_fixtures_notice_zero_points_off_by_one(name: str, tmp_path: Path) -> None:
    """If reading v1 as v2 changed nothing, the comparison above could not see the +1."""
    config = json.loads((FIXTURES / name / "config.json").read_text())
    config["quantization_config"] |= {"checkpoint_format": "gptq_v2", "format": "gptq_v2"}
    source = Source(FIXTURES / name)
    form = detect(config, source)
    for layer, weight in expected(FIXTURES / name).items():
        read = form.linear(source, layer, (weight.shape[0], weight.shape[1]), bias=False)
        assert not torch.equal(read.dequantize().to(weight.dtype), weight), layer


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("gptq-v1-4bit-ragged", "qweight"),
        ("gptq-v1-4bit-ragged", "qzeros"),
        ("awq-gemm-4bit-g32", "qweight"),
        ("awq-gemm-4bit-g32", "qzeros"),
        ("ct-4bit-asym-g32", "weight_packed"),
        ("ct-4bit-asym-g32", "weight_zero_point"),
    ],
)
def test_fixtures_notice_swapped_nibbles(name: str, part: str, tmp_path: Path) -> None:
    """If a swap of neighbouring nibbles went unseen, random weights would hide a wrong order."""
    words = stored(name, f"{QUERY}.{part}").view(torch.uint8)
    swapped = ((words >> 4) | (words << 4)).view(torch.int32)
    form, source = reader(changed(name, tmp_path, {f"{QUERY}.{part}": swapped}))
    weight = expected(FIXTURES / name)[QUERY]
    assert not torch.equal(form.linear(source, QUERY, (64, 64), bias=False).dequantize().half(), weight)


@pytest.mark.parametrize("name", ACT_ORDER)
def test_act_order_is_a_permutation_of_the_input(name: str) -> None:
    """y = W x must not depend on whether columns were sorted at load and x is permuted, or not."""
    form, source = reader(FIXTURES / name)
    weight = expected(FIXTURES / name)[QUERY].double()  # [out, in]
    read = form.linear(source, QUERY, (64, 64), bias=False)
    (permutation,) = read.pre
    x = torch.arange(64, dtype=torch.float64).sin()  # [in]
    term = read.terms[0].dequantize().half().double()  # [out, in], columns sorted by group
    assert torch.allclose(term @ permutation.apply(x), weight @ x, rtol=1e-12)


@pytest.mark.parametrize("name", [name for name in ALL if name not in ACT_ORDER and not name.startswith("quip")])
def test_layers_in_order_are_not_permuted(name: str) -> None:
    """GPTQModel writes g_idx for every layer; a permutation that does nothing would cost time at every token."""
    form, source = reader(FIXTURES / name)
    for layer, weight in expected(FIXTURES / name).items():
        read = form.linear(source, layer, (weight.shape[0], weight.shape[1]), f"{layer}.bias" in source)
        assert not any(isinstance(transform, Permutation) for transform in read.pre)


@pytest.mark.parametrize("name", ["gptq-v2-4bit-asym", "awq-gemm-4bit-g64-qwen2", "ct-mixed-groups-qwen2"])
def test_biases_are_read(name: str) -> None:
    """Qwen2 without its query, key and value biases still talks, badly."""
    form, source = reader(FIXTURES / name)
    read = form.linear(source, QUERY, (64, 64), bias=True)
    assert read.bias is not None
    assert torch.equal(read.bias, stored(name, f"{QUERY}.bias"))


@pytest.mark.parametrize("name", [name for name in ALL if name not in (TIED, "gptq-v1-3bit-lm-head")])
def test_dense_layers_keep_their_dtype(name: str) -> None:
    """The head is left dense by nearly every tool; it must come back as stored, not as float32."""
    form, source = reader(FIXTURES / name)
    width = source.shape("lm_head.weight")[1]
    read = form.linear(source, "lm_head", (96, width), bias=False)
    assert torch.equal(read.dequantize(), source.tensor("lm_head.weight").float())
    assert read.num_bytes == source.num_bytes("lm_head.weight")


def test_config_beside_the_model_is_found(tmp_path: Path) -> None:
    """AutoGPTQ left config.json alone and wrote quantize_config.json, without a quant_method."""
    name = "gptq-v1-4bit-ragged"
    shutil.copy(FIXTURES / name / "model.safetensors", tmp_path)
    beside: Mapping[str, Any] = {"bits": 4, "group_size": 32, "desc_act": False, "sym": False, "damp_percent": 0.01}
    (tmp_path / "quantize_config.json").write_text(json.dumps(beside))
    source = Source(tmp_path)
    read = detect({}, source).linear(source, QUERY, (64, 64), bias=False)
    assert torch.equal(read.dequantize().half(), load_file(FIXTURES / name / "expected.safetensors")[f"{QUERY}.weight"])
    assert present(source, QUERY, ("g_idx",)) == (f"{QUERY}.g_idx",)
