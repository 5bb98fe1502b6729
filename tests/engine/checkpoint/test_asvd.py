"""ASVD: a folder as the hub has them, served without its code."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from engine.checkpoint.asvd import read_config
from engine.checkpoint.errors import FormatRefused, TensorError
from engine.conversion.svd import LowRank
from engine.loading import load_model, open_checkpoint
from kernels.linear.lowrank.layout import LowRankWeights
from tests.engine.models.oracle import write_checkpoint
from tests.engine.models.variants import SIZES
from tests.engine.test_loading import plan_for

GATE = "model.layers.0.mlp.gate_proj"
OUT_PROJ = "model.layers.1.self_attn.o_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama of which two layers are pairs, one of them with a bias."""
    write_checkpoint(tmp_path, LlamaConfig(**SIZES, attention_bias=True))
    tensors = {name: tensor.clone() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    ranks = {}
    for name in (GATE, OUT_PROJ):
        (pair,) = LowRank(80).encode(tensors.pop(f"{name}.weight")).terms
        assert isinstance(pair, LowRankWeights)
        tensors |= {f"{name}.ALinear.weight": pair.a, f"{name}.BLinear.weight": pair.b}
        ranks[name] = pair.rank
    tensors[f"{OUT_PROJ}.ALinear.bias"] = tensors.pop(f"{OUT_PROJ}.bias")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "architectures": ["ASVDLlamaForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_asvd_llama.ASVDLlamaForCausalLM"},
        "truncation_ranks": ranks,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_pairs_are_read_and_served(folder: Path) -> None:
    """Bug: A and B swapped, a bias that stands beside A lost, remote code asked for."""
    checkpoint = open_checkpoint(folder)
    assert checkpoint.format.describe() == "ASVD, 2 low-rank pairs"
    stored = load_file(folder / "model.safetensors")
    read = checkpoint.format.linear(checkpoint.source, OUT_PROJ, (48, 48), True)
    exact = stored[f"{OUT_PROJ}.ALinear.weight"].double() @ stored[f"{OUT_PROJ}.BLinear.weight"].double()
    assert torch.equal(read.dequantize(), exact.float())
    assert read.bias is not None
    assert torch.equal(read.bias, stored[f"{OUT_PROJ}.ALinear.bias"])
    loaded = load_model(open_checkpoint(folder), plan_for(folder))
    assert sum("lowrank" in use.what for use in loaded.kernels) == 2


def test_ranks_that_are_not_those_of_the_tensors_are_named(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["truncation_ranks"][GATE] += 1
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(folder)
    with pytest.raises(TensorError, match=r"gate_proj.BLinear.weight' has shape"):
        checkpoint.format.linear(checkpoint.source, GATE, (72, 48), False)


@pytest.mark.parametrize("ranks", [[1, 2], {GATE: 0}, {GATE: "8"}, {GATE: True}])
def test_ranks_that_make_no_sense_are_refused(ranks: object) -> None:
    with pytest.raises(FormatRefused, match="truncation_ranks"):
        read_config({"truncation_ranks": ranks})
