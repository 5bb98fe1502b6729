"""A folder to a model that answers, and every way in which a folder can be wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

from engine.checkpoint.errors import TensorError
from engine.config import EngineConfig, Plan, resolve
from engine.loading import LoadedModel, load_model, model_facts, open_checkpoint
from kernels import native
from kernels.contract import KernelRefused
from kvcache.policy import PolicyError
from tests.engine.models.oracle import Session, exact_copy, make_world, write_checkpoint
from tests.engine.models.variants import SIZES
from tests.tolerance import assert_within

FIXTURES = Path(__file__).parents[1] / "fixtures"

Tensors = dict[str, Tensor]


def plan_for(folder: Path, **changes: Any) -> Plan:
    config = EngineConfig(str(folder), kv_policy="f32", page_size=16, kv_memory=1 << 30)
    return replace(resolve(config, model_facts(open_checkpoint(folder), config)), **changes)


def load(folder: Path, **changes: Any) -> LoadedModel:
    return load_model(open_checkpoint(folder), plan_for(folder, **changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An untied Llama, a fresh copy for every test to damage."""
    write_checkpoint(tmp_path, LlamaConfig(**SIZES))
    return tmp_path


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_equal_layers_are_summed_up() -> None:
    """Bug: a start screen of 200 lines, or one that hides that two layers run on another kernel."""
    loaded = load(FIXTURES / "gptq-v1-4bit-sym-g32", kernel="reference")
    uses = {(use.what, use.kernel) for use in loaded.kernels}
    whats = ("14 x affine 4-bit g32", "1 x dense float16", "2 x attention f32", "5 x norm")
    assert {(what, "reference") for what in whats} <= uses
    assert all("not the requested" in use.refusals for use in loaded.kernels if "affine" in use.what)
    assert (loaded.device, loaded.dtype) == ("cpu", "float32")


def test_layers_know_what_they_read() -> None:
    """Bug: a roofline that leaves out scales, or counts the embedding, of which a step reads one row."""
    loaded = load(FIXTURES / "gptq-v1-4bit-sym-g32", head_bits=16, kernel="reference")
    config = open_checkpoint(FIXTURES / "gptq-v1-4bit-sym-g32").config
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    elements = config.num_layers * (2 * hidden * q + 2 * hidden * kv + 3 * hidden * inner)
    by_what = {use.what.split(" ", 2)[2]: use.num_bytes for use in loaded.kernels}
    assert by_what["affine 4-bit g32"] == elements // 2 + elements // 32 * 2 + elements // 32  # codes, scales, zeros
    assert by_what["dense float16"] == 2 * config.vocab_size * hidden


@pytest.mark.skipif(native.MISSING is not None, reason=str(native.MISSING))
def test_a_head_in_16_bits_is_rounded_to_8_and_says_so() -> None:
    """Bug: a head as large as all other layers together, read in 16 bits for every token, or rounded in silence."""
    folder = FIXTURES / "gptq-v1-4bit-sym-g32"
    rounded, kept = load(folder), load(folder, head_bits=16)
    assert [use.kernel for use in rounded.kernels if "affine 8-bit g32" in use.what] == ["native"]
    assert any("--head-bits 16" in note for note in rounded.notes)
    assert not any("head" in note for note in kept.notes)
    assert any("--activations float" in note for note in kept.notes)
    assert not load(folder, head_bits=16, activations="float").notes
    assert "kept in 16 bits: native: not the requested 'reference'" in load(folder, kernel="reference").notes[0]


@pytest.mark.parametrize("name", ["hf-fp8-block", "ct-int8-token"])
def test_only_kernels_that_round_activations_are_said_to(name: str) -> None:
    """Bug: of a model whose format rounds its activations the start screen says that they are rounded to 8 bits, and
    names a flag that would change nothing."""
    assert not load(FIXTURES / name, head_bits=16).notes


@pytest.mark.skipif(native.MISSING is not None, reason=str(native.MISSING))
def test_a_head_that_cannot_be_rounded_is_named(folder: Path) -> None:
    """Bug: a traceback of the quantizer in place of the tensor that is damaged."""
    wide = LlamaConfig(**(SIZES | {"hidden_size": 32, "head_dim": 8}))
    write_checkpoint(folder, wide)
    rewrite(folder, lambda tensors: tensors["lm_head.weight"][3].fill_(float("nan")))
    with pytest.raises(TensorError, match=r"'lm_head.weight' cannot be rounded to 8 bits: .*not finite"):
        load(folder)


def test_a_kernel_that_cannot_serve_is_not_replaced(folder: Path) -> None:
    with pytest.raises(KernelRefused, match=r"no kernel 'fastest' for .*there is: .*reference"):
        load(folder, kernel="fastest")
    assert all(use.kernel == "reference" for use in load(folder, kernel="reference").kernels)


@pytest.mark.skipif(native.MISSING is not None, reason=str(native.MISSING))
def test_a_variant_of_a_kernel_can_be_asked_for() -> None:
    """Bug: --kernel triton-fixed refused by attention, which has no such variant, so that no model can have it."""
    loaded = load(FIXTURES / "gptq-v1-4bit-sym-g32", kernel="native-float")
    found = {use.what.split(" ", 2)[2]: use.kernel for use in loaded.kernels}
    assert found["affine 4-bit g32"] == found["affine 8-bit g32"] == "native-float"
    assert found["attention f32"] == "native"


def test_progress_reaches_the_end(folder: Path) -> None:
    heard: list[tuple[int, int]] = []
    checkpoint = open_checkpoint(folder, lambda done, total: heard.append((done, total)))
    assert not heard  # headers are not weights
    load_model(checkpoint, plan_for(folder))
    total = checkpoint.source.total_bytes
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)
    assert heard[-1] == (total, total)


def test_facts_come_from_headers(folder: Path) -> None:
    facts = model_facts(open_checkpoint(folder), EngineConfig(str(folder), kv_policy="f16"))
    assert facts.kv_bytes_per_token == 2 * 2 * 2 * 12 * 2  # K and V, layers, kv heads, head_dim, bytes
    assert facts.weight_bytes == sum(4 * t.numel() for t in load_file(folder / "model.safetensors").values())
    assert facts.max_position == 128
    with pytest.raises(PolicyError, match="f15"):
        model_facts(open_checkpoint(folder), EngineConfig(str(folder), kv_policy="f15"))


# -- tied heads ----------------------------------------------------------------------------------------------------


def tied(tmp_path: Path, change: Callable[[Tensors], object]) -> tuple[Path, Any]:
    config = LlamaConfig(**SIZES, tie_word_embeddings=True)
    theirs = write_checkpoint(tmp_path, config)
    rewrite(tmp_path, change)
    return tmp_path, theirs


def head_alone(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


def both(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


@pytest.mark.parametrize("change", [dict.copy, head_alone, both], ids=["embedding alone", "head alone", "both"])
def test_a_tied_head_may_be_stored_under_either_name(tmp_path: Path, change: Callable[[Tensors], object]) -> None:
    path, theirs = tied(tmp_path, change)
    world = make_world(path, theirs, exact_copy(theirs, theirs.config))
    session, answers = Session(world), world.answers[1]
    logits = session.run(answers.token_ids, session.table(23), [23])
    assert_within(logits, answers.logits, answers.bound, "logits")


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_an_untied_head_may_not_be_missing(folder: Path, name: str) -> None:
    """Bug: a head that is missing by accident is replaced by the embedding, and the model talks nonsense."""
    rewrite(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(TensorError, match=name.removesuffix(".weight")):
        load(folder)


# -- damaged checkpoints -------------------------------------------------------------------------------------------

K_PROJ = "model.layers.1.self_attn.k_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize("name", [K_PROJ, NORM, "model.norm.weight"])
def test_a_missing_tensor_is_named(folder: Path, name: str) -> None:
    rewrite(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(TensorError, match=rf"no tensor '{name}'"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [(K_PROJ, (12, 48), r"\[12, 48\], expected \[24, 48\]"), (NORM, (47,), r"\[47\], expected \[48\]")],
)
def test_a_tensor_of_another_shape_is_named(folder: Path, name: str, shape: tuple[int, ...], expected: str) -> None:
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(shape)}))
    with pytest.raises(TensorError, match=rf"{name}' has shape {expected}"):
        load(folder)


def test_a_tensor_left_over_is_named(folder: Path) -> None:
    """Bug: a model with one layer more than its config says, or with parts we do not know, is served without them."""
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(12)}))
    with pytest.raises(TensorError, match=r"does not use: model\.layers\.0\.self_attn\.q_norm\.weight \[12\]"):
        load(folder)


def test_a_bias_must_be_expected_or_zero(folder: Path) -> None:
    """AutoGPTQ writes biases of zeros; any other would be dropped silently."""
    name = K_PROJ.replace("weight", "bias")
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(24)}))
    load(folder)
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(24)}))
    with pytest.raises(TensorError, match=name):
        load(folder)
