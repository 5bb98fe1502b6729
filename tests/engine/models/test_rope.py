"""Inverse frequencies are transformers' to the bit: at position 100,000 their last bit is worth 0.01 radians."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.models.layers import Rope
from engine.models.rope import RopeConfig, RopeRefused, inverse_frequencies, read_rope
from kernels import rope

LLAMA_31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN_YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
PARAMETERS: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 1e4},
    {"rope_type": "default", "rope_theta": 1e6},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    LLAMA_31,
    LLAMA_31 | {"factor": 32.0},
    QWEN_YARN,
    QWEN_YARN | {"attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2},
    QWEN_YARN | {"mscale": 0.7, "mscale_all_dim": 0.5, "truncate": False},
    QWEN_YARN | {"factor": 1.0},
    QWEN_YARN | {"original_max_position_embeddings": 8},  # the ramp is a step
    QWEN_YARN | {"factor": None, "original_max_position_embeddings": 4096},
]


def config(parameters: dict[str, Any], head_dim: int = 128) -> Any:
    return LlamaConfig(head_dim=head_dim, rope_parameters=dict(parameters), max_position_embeddings=131072)


def given(parameters: dict[str, Any]) -> str:
    return " ".join(str(value) for value in parameters.values())


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("parameters", PARAMETERS, ids=given)
def test_frequencies_are_those_of_transformers(parameters: dict[str, Any], head_dim: int) -> None:
    hf = config(parameters, head_dim)
    compute: Any = ROPE_INIT_FUNCTIONS.get(hf.rope_parameters["rope_type"])
    expected, factor = (compute or LlamaRotaryEmbedding.compute_default_rope_parameters)(hf)
    ours = read_rope(hf)
    assert torch.equal(inverse_frequencies(ours), expected)
    assert ours.attention_factor == factor


@pytest.mark.parametrize("parameters", [PARAMETERS[0], LLAMA_31, QWEN_YARN], ids=given)
def test_angles_are_those_of_transformers_far_out(parameters: dict[str, Any]) -> None:
    hf = config(parameters)
    positions = torch.tensor([0, 1, 4095, 100_003, 131_071])
    theirs: Any = LlamaRotaryEmbedding(hf)
    cos, sin = theirs(torch.zeros(1), positions[None])  # each [1, 5, 128], the halves alike
    ours = Rope(rope.KERNELS[-1], read_rope(hf), torch.device("cpu")).angles(positions)
    assert torch.equal(ours.cos, cos[0, :, :64])
    assert torch.equal(ours.sin, sin[0, :, :64])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]},
            "'longrope' is not supported; .* yarn",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"full_attention": {"rope_type": "default"}}, "differ between layers"),
    ],
)
def test_what_is_not_served_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    hf = config(PARAMETERS[0])
    hf.rope_parameters.update(changes)
    with pytest.raises(RopeRefused, match=message):
        read_rope(hf)


def test_pairs_need_an_even_head() -> None:
    with pytest.raises(RopeRefused, match="head_dim 3 is odd"):
        read_rope(config(PARAMETERS[0], head_dim=3))


def test_dynamic_is_default_for_every_length_served() -> None:
    assert torch.equal(
        inverse_frequencies(RopeConfig("dynamic", 1e4, 64, factor=8.0)),
        inverse_frequencies(RopeConfig("default", 1e4, 64)),
    )
