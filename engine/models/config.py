"""What a model is made of, read from the config.json of a Hugging Face checkpoint."""

import json
import math
from dataclasses import dataclass
from typing import Any

import torch

from engine.models.rope import RopeConfig, RopeRefused, read_rope, rope_settings
from engine.models.settings import Settings, UnsupportedModel

LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a decoder. Sizes are counts of elements, positions count tokens."""

    architecture: str  # the class name in config.json, "LlamaForCausalLM"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # not always hidden_size / num_heads
    rms_norm_eps: float
    rope: RopeConfig
    qkv_bias: bool
    output_bias: bool  # of the attention's output projection
    mlp_bias: bool
    qk_norm: bool  # RMSNorm of every query and key head before RoPE
    tied_head: bool  # the output head is the embedding
    context_len: int  # the longest sequence that is served exactly
    notes: tuple[str, ...]  # what a user should know about context_len
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Biases:
    """The linear layers of an architecture that carry a bias."""

    qkv: bool = False
    output: bool = False
    mlp: bool = False


def read_config(settings: Settings, biases: Biases, qk_norm: bool, window: int | None) -> ModelConfig:
    """Check and translate a config.json. window: what limits attention.

    Raises UnsupportedModel naming the setting that is missing or not served.
    """
    _refuse_unserved(settings)
    hidden_size, num_heads = settings.size("hidden_size"), settings.size("num_attention_heads")
    num_kv_heads = settings.size_or_none("num_key_value_heads") or num_heads
    if num_heads % num_kv_heads:
        raise UnsupportedModel(f"num_attention_heads {num_heads} is not a multiple of {num_kv_heads} key-value heads")
    try:
        rope = read_rope(settings, _head_dim(settings, hidden_size, num_heads))
    except (RopeRefused, ArithmeticError) as error:
        raise UnsupportedModel(f"config.json, RoPE: {error}") from error
    context_len, notes = _context_len(settings, rope, window)
    vocab_size = settings.size("vocab_size")
    return ModelConfig(
        architecture=settings.get("architectures")[0],
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=settings.size("intermediate_size"),
        num_layers=settings.size("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=rope.head_dim,
        rms_norm_eps=settings.number("rms_norm_eps"),
        rope=rope,
        qkv_bias=biases.qkv,
        output_bias=biases.output,
        mlp_bias=biases.mlp,
        qk_norm=qk_norm,
        tied_head=settings.flag("tie_word_embeddings"),
        context_len=context_len,
        notes=notes,
        eos_token_ids=_eos_token_ids(settings, vocab_size),
    )


def _refuse_unserved(settings: Settings) -> None:
    for name in ("dtype", "torch_dtype"):
        value = settings.get(name)
        dtype = getattr(torch, value, None) if isinstance(value, str) else None
        if value is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise UnsupportedModel(f"{name} {value!r} is not what a model computes in: float32, float16 or bfloat16")
    if settings.get("hidden_act") != "silu":
        raise UnsupportedModel(f"hidden_act {settings.get('hidden_act')!r} is not supported; only 'silu' is")
    if settings.get("per_layer_config"):
        raise UnsupportedModel("per_layer_config is not supported: all layers must be built alike")
    if not 0 <= settings.number("rms_norm_eps") < math.inf:
        raise UnsupportedModel(f"rms_norm_eps must be at least 0, and finite; found {settings.get('rms_norm_eps')}")


def _head_dim(settings: Settings, hidden_size: int, num_heads: int) -> int:
    head_dim = settings.size_or_none("head_dim")
    if head_dim is None and hidden_size % num_heads:
        raise UnsupportedModel(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}")
    return head_dim or hidden_size // num_heads


def sliding_window(settings: Settings) -> int | None:
    """The window that limits attention in at least one layer, or None. Raises UnsupportedModel."""
    window, layer_types = settings.get("sliding_window"), settings.get("layer_types")
    if window is not None and (type(window) is not int or window < 1):
        raise UnsupportedModel(f"sliding_window must be a whole number of at least 1, or null; found {window!r}")
    if layer_types is None:
        return window
    if not isinstance(layer_types, list) or any(kind not in LAYER_TYPES for kind in layer_types):
        raise UnsupportedModel(f"layer_types must be a list of {' and '.join(LAYER_TYPES)}; found {layer_types!r}")
    if len(layer_types) != settings.size("num_hidden_layers"):
        raise UnsupportedModel(f"layer_types must name num_hidden_layers layers; found {len(layer_types)}")
    return window if "sliding_attention" in layer_types else None


def qwen_window(settings: Settings) -> int | None:
    """Likewise, where use_sliding_window switches it on, for the layers from max_window_layers up."""
    if not settings.flag("use_sliding_window"):
        return None
    first = settings.number("max_window_layers")
    if settings.get("layer_types") is None and first >= settings.size("num_hidden_layers"):
        return None
    return sliding_window(settings)


def _context_len(settings: Settings, rope: RopeConfig, window: int | None) -> tuple[int, tuple[str, ...]]:
    """How many tokens a sequence may have: what the positions were made for, cut where full attention is not exact."""
    context_len = settings.size("max_position_embeddings")
    notes: list[str] = []
    if rope.kind == "yarn" and "original_max_position_embeddings" in rope_settings(settings):
        # YaRN is often switched on by a rope_scaling entry alone, max_position_embeddings still saying the old length.
        context_len = max(context_len, math.floor(rope.factor * rope.original_max_position))
    if rope.kind == "dynamic":
        notes.append(f"dynamic RoPE scaling is not used: it would change no position below {context_len:,} tokens")
    if window is not None and window < context_len:
        notes.append(f"context limited to {window:,} of {context_len:,} tokens, the model's sliding attention window")
        context_len = window
    return context_len, tuple(notes)


def _eos_token_ids(settings: Settings, vocab_size: int) -> tuple[int, ...]:
    """The ids that end an answer: generation_config.json's when it names some, else config.json's."""
    path = settings.path.with_name("generation_config.json")
    found: Any = None
    if path.is_file():
        try:
            found = json.loads(path.read_text()).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise UnsupportedModel(f"{path} cannot be read: {error}") from error
    if found is None:
        path, found = settings.path, settings.get("eos_token_id")
    if found is None:
        return ()
    ids = found if isinstance(found, list) else [found]
    if any(type(token) is not int for token in ids):
        raise UnsupportedModel(f"{path}: eos_token_id must be a token id or a list of them, found {found!r}")
    # Some checkpoints name an id that the vocabulary does not have: it can never be generated, so it ends nothing.
    return tuple(token for token in ids if 0 <= token < vocab_size)
