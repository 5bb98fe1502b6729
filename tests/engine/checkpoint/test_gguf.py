"""GGUF files that llama.cpp's own tools wrote, against what gguf.quants and llama.cpp make of them."""

import hashlib
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.batch import BatchRow, build_batch
from engine.checkpoint.errors import TensorError
from engine.checkpoint.gguf import Gguf
from engine.checkpoint.gguf_blocks import LAYOUTS, to_term
from engine.checkpoint.gguf_file import TYPES, read_headers
from engine.checkpoint.gguf_source import GgufSource, public_name
from engine.config import EngineConfig, resolve
from engine.loading import load_model, model_facts, open_checkpoint
from engine.runner import Runner
from kvcache.layout import PageLayout
from kvcache.policy import read_policy
from kvcache.storage import PageStorage
from tests.tolerance import EPS, assert_within

FOLDER = Path(__file__).parents[2] / "fixtures" / "gguf"
MODELS = ("types.gguf", "mixed.gguf", "split-00001-of-00002.gguf", "stories260k.gguf")
PAGE_SIZE = 16


@cache
def expected() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text())
    return found


def runner(name: str, **settings: Any) -> Runner:
    """The model of a fixture over float32 pages."""
    checkpoint = open_checkpoint(FOLDER / name)
    config = EngineConfig(str(FOLDER / name), kv_policy="f32", page_size=PAGE_SIZE, kv_memory=8 << 20, **settings)
    plan = resolve(config, model_facts(checkpoint, config))
    sizes = checkpoint.config
    layout = PageLayout(read_policy("f32"), sizes.num_layers, sizes.num_kv_heads, sizes.head_dim, PAGE_SIZE)
    storage = PageStorage(layout, plan.num_pages, torch.device("cpu"))
    return Runner(load_model(checkpoint, plan).model, storage.layers)


def logits_of(model: Runner, prompt: list[int]) -> Tensor:
    """[len(prompt), vocab]."""
    return model.run(build_batch([BatchRow(prompt, 0, list(range(8)), PAGE_SIZE, len(prompt))]))


def continuation(model: Runner, prompt: list[int], num_tokens: int) -> list[int]:
    ids, found = list(prompt), []
    start = 0
    for _ in range(num_tokens):
        (row,) = model.run(build_batch([BatchRow(ids[start:], start, list(range(8)), PAGE_SIZE, 1)]))
        start = len(ids)
        ids.append(int(row.argmax()))
        found.append(ids[-1])
    return found


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_llama_cpp(name: str) -> None:
    """Bug: rows of heads not put back, another RoPE, a norm, a bias or a scale left out: fluent nonsense, no error.

    llama.cpp computed them in float32 from the dequantized weights. Both sides round sums of up to 256 terms, nine to a
    layer, each by 4 eps sqrt(256) of its size at most.
    """
    facts = expected()[name]
    model = runner(name, activations="float", head_bits=16)
    theirs = torch.tensor(facts["logits"])
    num_sums = 9 * open_checkpoint(FOLDER / name).config.num_layers + 1
    bound = num_sums * 4 * EPS * math.sqrt(256) * float(theirs.abs().max())
    assert_within(logits_of(model, facts["prompt"]), theirs, bound)
    assert continuation(model, facts["prompt"], len(facts["greedy"])) == facts["greedy"]


def test_a_story_is_told_as_by_llama_cpp() -> None:
    """The server's own settings: activations in 8 bits here and there. Every token led by 0.2 or more, and either
    rounding moves a logit by less (0.17 at most in llama.cpp, over the fixtures' other prompt)."""
    story = expected()["story"]
    assert continuation(runner("stories260k.gguf"), story["prompt"], 24) == story["greedy"]


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_of_the_tool_bit_for_bit(name: str) -> None:
    """Bug: a nibble, a scale or a minimum taken from elsewhere in a block, or formed in another order."""
    headers = read_headers(FOLDER / name)
    source = GgufSource(headers)
    form = Gguf(source.block_types(), {})
    for tensor, digest in expected()[name]["sha256"].items():
        public = public_name(tensor)
        if len(source.shape(public)) == 1:
            found = source.tensor(public)
        else:
            stored = next(header.tensors[tensor] for header in headers if tensor in header.tensors)
            shape = (stored.shape[0], stored.shape[1])
            layer = public.removesuffix(".weight")
            found = form.linear(source, layer, shape, f"{layer}.bias" in source).dequantize()
        assert hashlib.sha256((found + 0.0).numpy().tobytes()).hexdigest() == digest, tensor


def test_the_fixtures_hold_every_type() -> None:
    """A type that no fixture holds would be read on trust."""
    found = {block.name for name in MODELS for block in GgufSource(read_headers(FOLDER / name)).block_types().values()}
    assert found == {block.name for block in TYPES.values()}


def test_rows_of_heads_are_put_back() -> None:
    """One row after the other, as the docstring of the reader says it; biases too."""
    name = "model.layers.0.self_attn.q_proj"
    source = GgufSource(read_headers(FOLDER / "types.gguf"))
    shape, head_dim = (32, 256), 16
    stored = Gguf(source.block_types(), {}).linear(source, name, shape, False).dequantize()
    found = Gguf(source.block_types(), {"q_proj": 2}).linear(source, name, shape, False).dequantize()
    for head in range(2):
        for i in range(head_dim // 2):
            for j in range(2):
                row = found[head * head_dim + j * head_dim // 2 + i]
                assert torch.equal(row, stored[head * head_dim + 2 * i + j])


@pytest.mark.parametrize("name", ["types.gguf", "split-00001-of-00002.gguf"])
def test_an_embedding_gives_the_rows_of_its_matrix(name: str) -> None:
    """Tied or not, the lookup and the head must not unpack one tensor in two ways."""
    source = GgufSource(read_headers(FOLDER / name))
    form = Gguf(source.block_types(), {})
    shape = (64, 256 if name == "types.gguf" else 64)
    rows = form.rows(source, "model.embed_tokens", shape, (torch.device("cpu"), torch.float32))
    matrix = form.linear(source, "model.embed_tokens", shape, False).dequantize()
    ids = torch.tensor([5, 0, 63, 5])
    assert torch.equal(rows(ids), matrix[ids])


def test_tensors_of_other_shapes_are_named() -> None:
    """Settings of another model beside the tensors."""
    source = GgufSource(read_headers(FOLDER / "types.gguf"))
    form = Gguf(source.block_types(), {"q_proj": 3})
    with pytest.raises(TensorError, match=r"q_proj\.weight' has shape \[32, 256\], expected \[32, 512\]"):
        form.linear(source, "model.layers.0.self_attn.q_proj", (32, 512), False)
    with pytest.raises(TensorError, match=r"no tensor 'model\.layers\.9\.mlp\.up_proj\.weight'"):
        form.linear(source, "model.layers.9.mlp.up_proj", (32, 256), False)
    with pytest.raises(TensorError, match="has 32 rows, which are not 3 heads of an even size"):
        form.linear(source, "model.layers.0.self_attn.q_proj", (32, 256), False)


@pytest.mark.parametrize("kind", sorted(LAYOUTS))
def test_damaged_scales_are_named(kind: str) -> None:
    """One NaN would spread over every answer. Blocks of ones: a NaN in each place of a scale."""
    block = next(block for block in TYPES.values() if block.name == kind)
    raw = torch.full((2, block.num_bytes * (256 // block.weights)), 0xFF, dtype=torch.uint8)
    with pytest.raises(TensorError, match="'layer' is damaged: one of its scales is NaN"):
        to_term(raw, block, "layer")


def test_a_code_that_is_no_trit_is_named() -> None:
    """Of TQ2_0 the code 3 would be the weight 2."""
    block = next(block for block in TYPES.values() if block.name == "TQ2_0")
    raw = torch.zeros(2, block.num_bytes, dtype=torch.uint8)
    raw[1, 7] = 0b11 << 4
    with pytest.raises(TensorError, match="'layer' is damaged: codes reach 3"):
        to_term(raw, block, "layer")
