"""Converted checkpoints answer like models that hold their dequantized weights."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import LLM, Sampling
from engine.conversion.convert import convert
from engine.conversion.layers import linear_layers
from engine.loading import open_checkpoint
from engine.messages import ConversionSettings

DEMO = Path(__file__).parents[3] / "demo/checkpoint-fp16"
NUM_TOKENS = 128
PROMPT = "Once upon a time there was"

pytestmark = pytest.mark.skipif(not DEMO.is_dir(), reason="this checkout has no demo model in 16 bits")


def greedy(folder: Path) -> list[int]:
    """128 tokens, nothing rounded on purpose."""
    llm = LLM(str(folder), activations="float", head_bits=16, kv_policy="f32", kv_memory=32 << 20)
    (answer,) = llm.generate([PROMPT], Sampling(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True))
    return answer.token_ids


def dequantized(folder: Path, to: Path, dtype: torch.dtype) -> Path:
    """The demo model with the weights that a converted checkpoint defines."""
    shutil.copytree(DEMO, to)
    tensors = {name: tensor.clone() for name, tensor in load_file(to / "model.safetensors").items()}
    checkpoint = open_checkpoint(folder)
    for name, shape in linear_layers(DEMO).items():
        weights = checkpoint.format.linear(checkpoint.source, name, shape, False)
        tensors[f"{name}.weight"] = weights.dequantize().to(dtype)
    save_file(tensors, to / "model.safetensors")
    return to


@pytest.mark.parametrize(
    "scheme", ["rtn:b4:g64", "rtn:b3:g64:asym:clip", "mxint8", "nvfp4", "nvint4:h32", "ptqtp", "lowrank:p95"]
)
def test_greedy_answers_are_those_of_the_dequantized_weights(scheme: str, tmp_path: Path) -> None:
    """Bug: a container that reads back, and a server that computes something else: a transform on the wrong side, two
    planes of which one is served."""
    convert(DEMO, tmp_path / "new", ConversionSettings(scheme))
    answer = greedy(tmp_path / "new")
    assert len(answer) == NUM_TOKENS
    assert len(set(answer)) > 5  # no degenerate loop that any model would fall into
    assert answer == greedy(dequantized(tmp_path / "new", tmp_path / "dense", torch.float32))


def test_recovered_checkpoints_answer_like_the_model_they_came_from(tmp_path: Path) -> None:
    """The source in float16 itself, as papers publish it; served from its codes it gives the same 128 tokens."""
    convert(DEMO, tmp_path / "rounded", ConversionSettings("rtn:b4:g64:asym"))
    source = dequantized(tmp_path / "rounded", tmp_path / "source", torch.float16)
    conversion = convert(source, tmp_path / "new", ConversionSettings(None))
    assert all(layer.error == 0 and layer.bits < 4.4 for layer in conversion.layers)
    assert greedy(tmp_path / "new") == greedy(source)
