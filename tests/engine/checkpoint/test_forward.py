"""Whole models of the fixtures, served and asked: the logits of transformers with these weights, and of the tools."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from engine.checkpoint.format import detect
from engine.checkpoint.source import Source
from kernels.linear.int8.layout import Int8Weights
from kernels.linear.rounding import Rounding
from tests.engine.checkpoint.worlds import ALL, FIXTURES, QUERY, expected, reader
from tests.engine.models.oracle import TIMES_NOISE, Session, World, exact_copy, make_world, new_model

ANSWERED = [name for name in ALL if (FIXTURES / name / "expected_logits.safetensors").exists()]
IN_FLOAT32 = ("ct-", "modelopt-", "fp-quant-")  # tools that compute in it
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


@cache
def world(name: str) -> World:
    """The fixture as we serve it, and transformers' model with the dense weights of our readers."""
    folder = FIXTURES / name
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32  # models are made in it
    model = new_model(config)
    model.load_state_dict(dense_weights(folder, model))
    return make_world(folder, model, exact_copy(model, config))


def dense_weights(folder: Path, model: Any) -> dict[str, Tensor]:
    """Every tensor of the model in float32: linear layers by the reader of their format, others as stored."""
    source = Source(folder)
    form = detect(json.loads((folder / "config.json").read_text()), source)
    weights = {}
    for name, parameter in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer.split(".")[-1] in LINEAR and not name.endswith("bias"):
            tied = layer == "lm_head" and not any(tensor.startswith("lm_head.") for tensor in source.names())
            shape = (parameter.shape[0], parameter.shape[1])
            has_bias = f"{layer}.bias" in source
            weights[name] = (
                source.tensor("model.embed_tokens.weight").float()
                if tied
                else form.linear(source, layer, shape, has_bias).dequantize()
            )
        else:
            weights[name] = source.tensor(name).float()
    return weights


def rounds_activations(name: str) -> bool:
    """Whether the format rounds what a dense model does not."""
    form, source = reader(FIXTURES / name)
    if QUERY not in expected(FIXTURES / name):
        return False
    out_features, in_features = expected(FIXTURES / name)[QUERY].shape
    read = form.linear(source, QUERY, (out_features, in_features), f"{QUERY}.bias" in source)
    return isinstance(read.terms[0], Int8Weights) or any(isinstance(transform, Rounding) for transform in read.pre)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_logits_are_those_of_the_dense_model(name: str) -> None:
    """Bug: a layer bound to another layer's weights, act-order forgotten, a bias dropped; whole and in chunks."""
    if rounds_activations(name):
        pytest.skip("the format rounds activations, and a dense model does not")
    ours = world(name)
    session = Session(ours)
    for answers, chunks in zip(ours.answers, ([37], [20, 1, 1, 1]), strict=True):
        logits = session.run(answers.token_ids, session.table(sum(chunks)), chunks)
        assert (logits.double() - answers.logits).abs().max() <= answers.bound


@pytest.mark.parametrize("name", ANSWERED)
@torch.no_grad()
def test_logits_are_those_of_the_tool(name: str) -> None:
    """Bug: a table, an offset or an order that our reader and its dequantized weights share.

    Other tools than those of IN_FLOAT32 compute in bfloat16 or round activations to 8 bits on a CPU, even when asked
    for float32. Activations that a format rounds do not differ by the noise, but by a whole code where one falls
    between two: none does here.
    """
    stored = load_file(FIXTURES / name / "expected_logits.safetensors")
    ours = world(name)
    session = Session(ours)
    ids = stored["ids"].tolist()
    logits = session.run(ids, session.table(len(ids)), [len(ids)])
    bound = TIMES_NOISE * torch.finfo(torch.bfloat16).eps * float(stored["logits"].abs().max())
    if name.startswith(IN_FLOAT32):
        bound = max(answers.bound for answers in ours.answers)
    assert (logits - stored["logits"]).abs().max() <= bound
