"""torchao: what the header of a file says of its weights, and the layouts that are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoint.errors import CheckpointError, FormatRefused
from engine.checkpoint.source import Source
from engine.checkpoint.torchao import read_config
from tests.engine.checkpoint.worlds import FIXTURES, QUERY

FOUR_BITS = "torchao-intx-4bit"
INTX = {"block_size": [1, 32], "target_dtype": {"_type": "torch.dtype", "_data": "int4"}}


def write(folder: Path, kind: str, attributes: Any, **tensors: Tensor) -> Source:
    """One query layer [64, 64] of the subclass `kind`; its tensors are those of the 4-bit fixture unless given."""
    stored = load_file(FIXTURES / FOUR_BITS / "model.safetensors")
    parts = {name: stored[f"{QUERY}._weight_{name}"] for name in ("qdata", "scale", "zero_point")} | tensors
    header = {f"{QUERY}.weight": json.dumps({"_type": kind, "_data": attributes})}
    named = {f"{QUERY}._weight_{name}": tensor for name, tensor in parts.items()}
    save_file(named, folder / "model.safetensors", header)
    return Source(folder)


@pytest.mark.parametrize(
    ("kind", "attributes", "message"),
    [
        ("Int4TilePackedTo4dTensor", {}, "Int4TilePackedTo4dTensor.*one device.*IntxWeightOnlyConfig"),
        ("Float8Tensor", {}, "Float8Tensor"),
        ("IntxUnpackedToInt8Tensor", INTX | {"block_size": [1, 48]}, r"blocks of \[1, 48\] do not divide"),
        ("IntxUnpackedToInt8Tensor", INTX | {"block_size": [1, 0]}, r"blocks of \[1, 0\]"),
        ("IntxUnpackedToInt8Tensor", INTX | {"block_size": 32}, "block_size"),
        ("IntxUnpackedToInt8Tensor", INTX | {"target_dtype": {"_data": "int9"}}, "int9"),
        ("IntxUnpackedToInt8Tensor", INTX | {"target_dtype": {"_data": "int2"}}, "codes beyond int2"),
        ("IntxUnpackedToInt8Tensor", "none", "header"),
    ],
)
def test_descriptions_that_do_not_fit_are_named(kind: str, attributes: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_config({}).linear(write(tmp_path, kind, attributes), QUERY, (64, 64), bias=False)


@pytest.mark.parametrize("part", ["act_pre_scale", "act_quant_scale"])
def test_static_activations_are_refused(part: str, tmp_path: Path) -> None:
    """A scale of activations that is read over serves another model."""
    source = write(tmp_path, "IntxUnpackedToInt8Tensor", INTX, **{part: torch.ones(1)})
    with pytest.raises(FormatRefused, match=part):
        read_config({}).linear(source, QUERY, (64, 64), bias=False)


def test_a_file_without_a_description_is_refused(tmp_path: Path) -> None:
    """Whoever saves tensors again and forgets the header leaves codes that nobody can read."""
    stored = load_file(FIXTURES / FOUR_BITS / "model.safetensors")
    save_file({f"{QUERY}._weight_qdata": stored[f"{QUERY}._weight_qdata"]}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"header of the file .*q_proj"):
        read_config({}).linear(Source(tmp_path), QUERY, (64, 64), bias=False)


def test_a_description_of_brackets_without_end_is_refused(tmp_path: Path) -> None:
    """Bug: a RecursionError of the JSON decoder, which nobody catches."""
    name = f"{QUERY}._weight_qdata"
    nested = '{"_type": "Int4Tensor", "_data": {"deep": ' + "[" * 100_000
    save_file({name: torch.zeros(1)}, tmp_path / "model.safetensors", {f"{QUERY}.weight": nested})
    with pytest.raises(CheckpointError, match="header"):
        read_config({}).linear(Source(tmp_path), QUERY, (64, 64), bias=False)


def test_int4_tensors_have_minima(tmp_path: Path) -> None:
    """w = q * scale + zero_point with signed codes, low nibble first, scales and zero points [groups, out].

    The tool quantizes them on a GPU only: this is its definition, written again.
    """
    random = torch.Generator().manual_seed(3)
    q = torch.randint(-8, 8, (64, 64), generator=random, dtype=torch.int8)
    scale = torch.rand(2, 64, generator=random).bfloat16()
    zero = torch.randn(2, 64, generator=random).bfloat16()
    packed = (q[:, 0::2] & 15) | (q[:, 1::2] << 4)
    source = write(tmp_path, "Int4Tensor", {"block_size": [1, 32]}, qdata=packed, scale=scale, zero_point=zero)
    read = read_config({}).linear(source, QUERY, (64, 64), bias=False)
    spread = [part.T.double().repeat_interleave(32, dim=1) for part in (scale, zero)]  # [out, in]
    exact = q.double() * spread[0] + spread[1]
    largest = 16 * spread[0] + spread[1].abs()  # of a product, an offset, or their sum
    assert ((read.dequantize().double() - exact).abs() <= 3 * 2**-24 * largest).all()


def test_quantized_embeddings_are_refused() -> None:
    with pytest.raises(FormatRefused, match="include_input_output_embeddings"):
        read_config({"quant_method": "torchao", "include_input_output_embeddings": True})
