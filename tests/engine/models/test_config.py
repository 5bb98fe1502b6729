"""config.json to ModelConfig: what is honoured, what bounds the context, what is refused by name."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from engine.models.config import ModelConfig, UnsupportedModel
from engine.models.registry import describe


def written(folder: Path, config: PreTrainedConfig, architecture: str, **changes: Any) -> Path:
    """A model folder with this config.json, `changes` laid over it as they are."""
    config.architectures = [architecture]
    config.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def llama(folder: Path, **changes: Any) -> ModelConfig:
    return describe(written(folder, LlamaConfig(), "LlamaForCausalLM", **changes)).config


def test_head_dim_and_biases_follow_the_architecture(tmp_path: Path) -> None:
    plain = llama(tmp_path)
    assert (plain.head_dim, plain.num_kv_heads) == (128, 32)
    assert (plain.qkv_bias, plain.output_bias, plain.mlp_bias, plain.qk_norm) == (False, False, False, False)
    qwen2 = describe(written(tmp_path, Qwen2Config(), "Qwen2ForCausalLM")).config
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.mlp_bias, qwen2.qk_norm) == (True, False, False, False)
    qwen3 = describe(written(tmp_path, Qwen3Config(attention_bias=True), "Qwen3ForCausalLM")).config
    assert (qwen3.qkv_bias, qwen3.output_bias, qwen3.mlp_bias, qwen3.qk_norm) == (True, True, False, True)


def test_old_configs_are_read(tmp_path: Path) -> None:
    """What Llama 2 era files say: rope_theta and rope_scaling at the top, the type under "type", no head_dim."""
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": 99,
        "rope_theta": 5000.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "torch_dtype": "float16",
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = describe(tmp_path).config
    assert (config.head_dim, config.num_kv_heads, config.rope.theta) == (16, 4, 5000.0)
    assert (config.rope.kind, config.rope.factor, config.context_len) == ("linear", 2.0, 2048)


@pytest.mark.parametrize(
    ("config", "architecture", "window"),
    [
        (MistralConfig(sliding_window=4096), "MistralForCausalLM", 4096),
        (MistralConfig(sliding_window=None), "MistralForCausalLM", None),
        (Qwen2Config(use_sliding_window=False, sliding_window=4096), "Qwen2ForCausalLM", None),
        (Qwen2Config(use_sliding_window=True, sliding_window=4096, max_window_layers=2), "Qwen2ForCausalLM", 4096),
        (Qwen2Config(use_sliding_window=True, sliding_window=4096, max_window_layers=32), "Qwen2ForCausalLM", None),
        (Qwen3Config(use_sliding_window=True, sliding_window=4096, max_window_layers=0), "Qwen3ForCausalLM", 4096),
    ],
)
def test_a_sliding_window_in_force_bounds_the_context(
    tmp_path: Path, config: PreTrainedConfig, architecture: str, window: int | None
) -> None:
    """Bug: full attention over 32k tokens in a model trained to see 4k of them."""
    read = describe(written(tmp_path, config, architecture)).config
    assert read.context_len == (window or config.max_position_embeddings)
    assert bool(read.notes) == (window is not None)


def test_yarn_lengthens_the_context_only_where_the_file_says_what_it_was(tmp_path: Path) -> None:
    yarn: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    as_qwen_documents_it = llama(tmp_path, max_position_embeddings=32768, rope_parameters=yarn)
    assert as_qwen_documents_it.context_len == 131072
    del yarn["original_max_position_embeddings"]
    assert llama(tmp_path, max_position_embeddings=131072, rope_parameters=yarn).context_len == 131072


def test_dynamic_rope_ends_where_it_would_begin(tmp_path: Path) -> None:
    config = llama(tmp_path, rope_parameters={"rope_type": "dynamic", "factor": 4.0}, max_position_embeddings=2048)
    assert config.context_len == 2048
    assert "dynamic RoPE scaling is not used" in config.notes[0]


def test_end_of_answer_ids_come_from_the_generation_config_first(tmp_path: Path) -> None:
    assert llama(tmp_path, eos_token_id=[7, 8]).eos_token_ids == (7, 8)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    assert llama(tmp_path, eos_token_id=7).eos_token_ids == (7,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 10]}')
    assert llama(tmp_path, eos_token_id=7).eos_token_ids == (9, 10)
    (tmp_path / "generation_config.json").unlink()
    assert llama(tmp_path, eos_token_id=None).eos_token_ids == ()


@pytest.mark.parametrize("ends", ['"</s>"', "1.5", "true", "[2, null]"])
def test_an_end_that_is_no_token_id_is_refused(tmp_path: Path, ends: str) -> None:
    """Bug: ignored, and answers that never end."""
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {ends}}}')
    with pytest.raises(UnsupportedModel, match=r"generation_config.json: eos_token_id must be a token id or a list"):
        llama(tmp_path, eos_token_id=7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"], "model_type": "gemma"}, "GemmaForCausalLM .* supported are LlamaFor"),
        ({"architectures": None}, "architecture none"),
        ({"model_type": "mistral"}, "with model_type 'mistral' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; only 'silu'"),
        ({"num_attention_heads": 32, "num_key_value_heads": 5}, "num_attention_heads 32 is not a multiple of 5"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, .* found 0"),
        ({"hidden_size": "wide"}, "not a valid configuration: .* 'hidden_size' expected int, got str"),
        ({"dtype": "int8"}, "dtype 'int8' is not what a model computes in: float32, float16 or bfloat16"),
        ({"dtype": 5}, "dtype 5 is not"),
        ({"torch_dtype": "banana"}, "torch_dtype 'banana' is not"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be at least 0, and finite; found nan"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps must be at least 0"),
        ({"sliding_window": 0}, "sliding_window must be a whole number of at least 1, or null; found 0"),
        ({"sliding_window": "4k"}, "sliding_window must be .* found '4k'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1}}, "rope_theta of RoPE must be more than 1"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 0, "rope_theta": 1e4}},
            "factor of RoPE must .* found 0",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "beta_slow": -1}},
            "beta_slow of RoPE must be more than 0, and finite; found -1",
        ),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "not a valid configuration.*factor"),
        (
            {"rope_parameters": {"rope_type": "longrope", "factor": 2.0, "short_factor": [], "long_factor": []}},
            "'longrope' is not supported",
        ),
    ],
)
def test_what_is_not_served_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        llama(tmp_path, **changes)


def test_code_of_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    """A checkpoint that brings its own classes is read with ours."""
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    assert llama(tmp_path, auto_map={"AutoConfig": "evil.Config"}).architecture == "LlamaForCausalLM"


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"not a model folder: it has no config\.json"):
        describe(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnsupportedModel, match="cannot be read"):
        describe(tmp_path)
    written(tmp_path, LlamaConfig(), "LlamaForCausalLM")
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(UnsupportedModel, match=r"generation_config\.json cannot be read"):
        describe(tmp_path)


@pytest.mark.parametrize("name", ["hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"])
def test_a_size_that_is_missing_is_named(tmp_path: Path, name: str) -> None:
    """Bug: hidden_size 4096 for every file without one, and then a tensor of another shape."""
    path = written(tmp_path, LlamaConfig(), "LlamaForCausalLM") / "config.json"
    raw = json.loads(path.read_text())
    del raw[name]
    path.write_text(json.dumps(raw))
    with pytest.raises(UnsupportedModel, match=rf"config\.json has no {name}"):
        describe(tmp_path)


def test_reading_a_configuration_leaves_the_compiler_and_other_machines_alone() -> None:
    """Bug: 95 MB of torch's compiler in every server, and 0.5 s of every start for its distributed tensors, since
    transformers imports both with a configuration."""
    checkpoint = Path(__file__).parents[3] / "demo" / "checkpoint"
    code = (
        "import sys, torch; from pathlib import Path; from engine import process; process.be_alone(); "
        "from engine.models.config import load_hf_config; "
        f"disable = torch.compiler.disable; load_hf_config(Path({str(checkpoint)!r})); "
        "assert not {'torch._dynamo', 'torch.distributed.tensor'} & set(sys.modules); "
        "assert torch.compiler.disable is disable"
    )
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)
