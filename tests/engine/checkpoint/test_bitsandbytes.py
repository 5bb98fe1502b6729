"""bitsandbytes: settings, states beside the weights, and what does not fit them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.checkpoint.bitsandbytes import STATE, read_config
from engine.checkpoint.errors import FormatRefused, TensorError
from engine.checkpoint.source import Source
from kernels.linear.table.layout import TableWeights
from tests.engine.checkpoint.worlds import DOWN, FIXTURES, QUERY, changed, expected, stored

NESTED = "bnb-nf4-nested-ragged-qwen2"
INT8 = "bnb-int8"
FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
EIGHT = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}
JSON_OF_QUERY = f"{QUERY}.{STATE}nf4"


def with_state(folder: Path, **changes: Any) -> Source:
    """The nested fixture with other values in the JSON of the query weight."""
    state = json.loads(bytes(stored(NESTED, JSON_OF_QUERY).tolist())) | changes
    written = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return Source(changed(NESTED, folder, {JSON_OF_QUERY: written}))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"load_in_4bit": False}, "one of load_in_4bit and load_in_8bit"),
        ({"load_in_8bit": True}, "one of load_in_4bit and load_in_8bit"),
        ({"llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight"),
        ({"load_in_4bit": "yes"}, "load_in_4bit"),
    ],
)
def test_settings_that_are_not_honoured_are_refused_by_name(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatRefused, match=message):
        read_config(FOUR | setting)


def test_blocks_that_straddle_rows_become_groups_that_do_not() -> None:
    """96 inputs in blocks of 64: row 1 begins with the half of a block of row 0."""
    source = Source(FIXTURES / NESTED)
    (term,) = read_config(FOUR).linear(source, DOWN, (64, 96), bias=False).terms
    assert isinstance(term, TableWeights)
    assert term.group_size == 32
    assert term.scales[0, 2] == term.scales[1, 0]
    assert torch.equal(term.dequantize(), expected(FIXTURES / NESTED)[DOWN])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [64, 32]}, r"shape \[64, 32\], expected \[64, 64\]"),
        ({"shape": [64, 64, 1]}, "JSON"),
        ({"blocksize": 0}, "blocksize 0"),
        ({"blocksize": 1 << 40}, "blocksize"),
        ({"blocksize": 128}, r"absmax' has shape \[64\], expected \[32\]"),
        ({"nested_blocksize": 16}, r"nested_absmax' has shape \[1\], expected \[4\]"),
        ({"nested_offset": None}, "only one of nested_blocksize and nested_offset"),
        ({"nested_dtype": "float16"}, "nested_dtype"),
        ({"quant_type": "int4"}, "quant_type"),
        ({"nested_offset": 1e300}, "absmax' holds values that are not finite"),
    ],
)
def test_states_that_do_not_fit_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TensorError, match=message):
        read_config(FOUR).linear(with_state(tmp_path, **changes), QUERY, (64, 64), bias=True)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(1 << 13, dtype=torch.uint8), "at most 4096 bytes"),
        (torch.full((9,), 255, dtype=torch.uint8), "does not hold the JSON"),
        (torch.zeros(4, 4, dtype=torch.uint8), r"shape \[4, 4\]"),
    ],
)
def test_states_that_are_no_json_are_named(tensor: Tensor, message: str, tmp_path: Path) -> None:
    source = Source(changed(NESTED, tmp_path, {JSON_OF_QUERY: tensor}))
    with pytest.raises(TensorError, match=message):
        read_config(FOUR).linear(source, QUERY, (64, 64), bias=True)


def test_another_table_is_refused(tmp_path: Path) -> None:
    """The tool never looks at the table it stores; weights made with another one would be served with ours."""
    name = f"{QUERY}.weight.quant_map"
    source = Source(changed(NESTED, tmp_path, {name: stored(NESTED, name).flip(0)}))
    with pytest.raises(TensorError, match="quant_map' is not the table"):
        read_config(FOUR).linear(source, QUERY, (64, 64), bias=True)


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("weight_format", torch.tensor(2, dtype=torch.uint8), "order of a GPU kernel"),
        ("SCB", torch.full((64,), torch.nan), "SCB' holds values that are not finite"),
        ("SCB", torch.ones(32), r"SCB' has shape \[32\], expected \[64\]"),
        ("SCB", None, "weight' has dtype int8"),
        ("weight", torch.zeros(64, 64, dtype=torch.uint8), "weight' has dtype uint8, expected int8"),
    ],
)
def test_int8_tensors_that_do_not_fit_are_named(part: str, tensor: Tensor | None, message: str, tmp_path: Path) -> None:
    source = Source(changed(INT8, tmp_path, {f"{QUERY}.{part}": tensor}))
    with pytest.raises(TensorError, match=message):
        read_config(EIGHT).linear(source, QUERY, (64, 64), bias=False)
