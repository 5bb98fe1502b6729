"""What a model is made of, read from the settings of a GGUF file instead of a config.json."""

import math
from collections.abc import Mapping
from types import MappingProxyType

from engine.checkpoint.gguf_file import Settings
from engine.models import llama, qwen2, qwen3
from engine.models.config import ModelConfig, UnsupportedModel
from engine.models.registry import Architecture, ModelDescription
from engine.models.rope import RopeConfig, RopeRefused

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({"llama": llama, "qwen2": qwen2, "qwen3": qwen3})
CONTROL = 3  # of tokenizer.ggml.token_type: markup, not text
# What ends an answer besides the tokens that settings name, as llama.cpp knows it by name.
ENDS = frozenset(
    (
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<EOT>",
        "</s>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek
    )
)


def describe(
    settings: Settings, shapes: Mapping[str, tuple[int, ...]], frequency_factors: tuple[float, ...]
) -> ModelDescription:
    """`shapes` are those of the file's tensors under its own names, `frequency_factors` the contents of rope_freqs.

    Raises UnsupportedModel naming what stands in the way, and what `settings` raise.
    """
    name = settings.text("general.architecture")
    architecture = ARCHITECTURES.get(name)
    if architecture is None:
        raise UnsupportedModel(f"GGUF architecture {name!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
    if settings.integer(f"{name}.expert_count", 0):
        raise UnsupportedModel(f"{name}.expert_count: mixtures of experts are not supported in GGUF files")
    embedding = shapes.get("token_embd.weight")
    if embedding is None or len(embedding) != 2:
        raise UnsupportedModel("the model has no token_embd.weight of two dimensions")
    return ModelDescription(architecture, _config(settings, shapes, name, frequency_factors))


def _config(
    settings: Settings, shapes: Mapping[str, tuple[int, ...]], name: str, frequency_factors: tuple[float, ...]
) -> ModelConfig:
    hidden_size, num_heads = (
        _count(settings, f"{name}.{what}") for what in ("embedding_length", "attention.head_count")
    )
    num_kv_heads = _count(settings, f"{name}.attention.head_count_kv", num_heads)
    if num_heads % num_kv_heads:
        raise UnsupportedModel(f"attention.head_count {num_heads} is not a multiple of {num_kv_heads} key-value heads")
    vocab_size = shapes["token_embd.weight"][0]
    try:
        rope = _rope(settings, name, _head_dim(settings, name, hidden_size, num_heads), frequency_factors)
    except RopeRefused as error:
        raise UnsupportedModel(str(error)) from error
    eps = settings.number(f"{name}.attention.layer_norm_rms_epsilon")
    if eps < 0:
        raise UnsupportedModel(f"{name}.attention.layer_norm_rms_epsilon must be at least 0, found {eps}")
    context_len, notes = _context_len(settings, name, rope)
    return ModelConfig(
        architecture=ARCHITECTURES[name].NAME,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=_count(settings, f"{name}.feed_forward_length"),
        num_layers=_count(settings, f"{name}.block_count"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=rope.head_dim,
        rms_norm_eps=eps,
        rope=rope,
        qkv_bias="blk.0.attn_q.bias" in shapes,
        output_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_down.bias" in shapes,
        qk_norm="blk.0.attn_q_norm.weight" in shapes,
        tied_head="output.weight" not in shapes,
        context_len=context_len,
        notes=notes,
        eos_token_ids=_eos_token_ids(settings, vocab_size),
    )


def _count(settings: Settings, name: str, default: int | None = None) -> int:
    value = settings.integer(name, default)
    if value < 1:
        raise UnsupportedModel(f"{name} must be at least 1, found {value}")
    return value


def _head_dim(settings: Settings, name: str, hidden_size: int, num_heads: int) -> int:
    """Of keys, values and the part that RoPE turns, which must be the same."""
    head_dim = settings.integer(f"{name}.attention.key_length", hidden_size // num_heads)
    for other in ("attention.value_length", "rope.dimension_count"):
        if settings.integer(f"{name}.{other}", head_dim) != head_dim:
            found = settings.integer(f"{name}.{other}")
            raise UnsupportedModel(f"{name}.{other} is {found}; only {head_dim}, the length of keys, is supported")
    if head_dim < 2 or head_dim % 2:
        raise UnsupportedModel(f"heads of {head_dim} channels: RoPE turns pairs of channels")
    return head_dim


def _rope(settings: Settings, name: str, head_dim: int, frequency_factors: tuple[float, ...]) -> RopeConfig:
    theta = settings.number(f"{name}.rope.freq_base", 10_000.0)
    kind = settings.text(f"{name}.rope.scaling.type", "none")
    factor = settings.number(f"{name}.rope.scaling.factor", settings.number(f"{name}.rope.scale_linear", 1.0))
    if frequency_factors:
        if len(frequency_factors) != head_dim // 2 or not all(0 < value < math.inf for value in frequency_factors):
            raise UnsupportedModel(f"rope_freqs.weight must hold {head_dim // 2} positive numbers")
        if kind != "none" or factor != 1.0:
            raise UnsupportedModel(f"RoPE scaling {kind!r} together with rope_freqs.weight is not supported")
        return RopeConfig("factors", theta, head_dim, factors=frequency_factors)
    if kind == "yarn":
        return _yarn(settings, name, RopeConfig("yarn", theta, head_dim, factor))
    if kind not in ("none", "linear"):
        raise UnsupportedModel(
            f"RoPE scaling {kind!r} is not supported; supported are none, linear, yarn and rope_freqs"
        )
    return RopeConfig("default" if factor == 1.0 else "linear", theta, head_dim, factor)


def _yarn(settings: Settings, name: str, rope: RopeConfig) -> RopeConfig:
    scaling = f"{name}.rope.scaling"
    if settings.number(f"{scaling}.yarn_log_multiplier", 0.0):
        raise UnsupportedModel(f"{scaling}.yarn_log_multiplier is not supported")
    temperature = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
    return RopeConfig(
        kind="yarn",
        theta=rope.theta,
        head_dim=rope.head_dim,
        factor=rope.factor,
        original_max_position=_count(settings, f"{scaling}.original_context_length"),
        beta_fast=settings.number(f"{scaling}.yarn_beta_fast", 32.0),
        beta_slow=settings.number(f"{scaling}.yarn_beta_slow", 1.0),
        attention_factor=settings.number(f"{scaling}.attn_factor", 1.0) * temperature,
    )


def _context_len(settings: Settings, name: str, rope: RopeConfig) -> tuple[int, tuple[str, ...]]:
    context_len, notes = _count(settings, f"{name}.context_length"), []
    if rope.kind == "yarn":
        context_len = max(context_len, math.floor(rope.factor * rope.original_max_position))
    window = settings.integer(f"{name}.attention.sliding_window", 0)
    if 0 < window < context_len:
        notes.append(f"context limited to {window:,} of {context_len:,} tokens, the model's sliding attention window")
        context_len = window
    return context_len, tuple(notes)


def _eos_token_ids(settings: Settings, vocab_size: int) -> tuple[int, ...]:
    """The ids that settings name, and control tokens that are known to end an answer; those the vocabulary has."""
    ids = {settings.integer(f"tokenizer.ggml.{end}_token_id", -1) for end in ("eos", "eot", "eom")}
    if "tokenizer.ggml.tokens" in settings and "tokenizer.ggml.token_type" in settings:
        types = settings.array("tokenizer.ggml.token_type", int)
        named = zip(settings.array("tokenizer.ggml.tokens", str), types, strict=False)
        ids |= {token for token, (text, kind) in enumerate(named) if kind == CONTROL and text in ENDS}
    return tuple(sorted(token for token in ids if 0 <= token < vocab_size))
