"""What a model is made of, read from the config.json of a Hugging Face checkpoint."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from engine.models.rope import RopeConfig, RopeRefused, read_rope

# Lists are made by these before a tensor is looked at.
SIZES = MappingProxyType(
    {
        "num_hidden_layers": 1 << 12,
        "num_attention_heads": 1 << 16,
        "num_key_value_heads": 1 << 16,
        "head_dim": 1 << 16,
        "vocab_size": 1 << 28,
        "hidden_size": 1 << 24,
        "intermediate_size": 1 << 24,
        "max_position_embeddings": 1 << 40,
    }
)
# For these transformers assumes those of a 7B model, which would end in a tensor of another shape.
NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# What transformers and float() raise for values that are no settings.
INVALID = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    OSError,
    StrictDataclassError,
)


class UnsupportedModel(ValueError):
    """The checkpoint is not one that can be served; the message names what stands in the way."""


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


def read_json(folder: Path) -> dict[str, Any]:
    """Return the checkpoint's config.json as it stands. Raises UnsupportedModel when it is missing or not JSON."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UnsupportedModel(f"{folder} is not a model folder: it has no config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedModel(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UnsupportedModel(f"{path} must hold a JSON object, found {type(content).__name__}")
    return content


def load_hf_config(folder: Path) -> Any:
    """The checkpoint's configuration with transformers' defaults filled in. No code of the checkpoint is run."""
    raw = read_json(folder)
    _refuse_dtype(raw)
    if missing := [name for name in NEEDED if name not in raw]:
        raise UnsupportedModel(
            f"{folder / 'config.json'} has no {missing[0]}, without which the model cannot be built: take the "
            "config.json that belongs to the weights"
        )
    try:
        with _without_compiler():
            return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except INVALID as error:
        reason = " ".join(str(error).split())  # transformers spreads it over lines
        raise UnsupportedModel(f"{folder / 'config.json'} is not a valid configuration: {reason}") from error


def _refuse_dtype(raw: Mapping[str, Any]) -> None:
    """transformers takes some that are none, and does not name the setting when it refuses others."""
    for name in ("dtype", "torch_dtype"):
        value = raw.get(name)
        dtype = getattr(torch, value, None) if isinstance(value, str) else None
        if value is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise UnsupportedModel(f"{name} {value!r} is not what a model computes in: float32, float16 or bfloat16")


@contextmanager
def _without_compiler() -> Iterator[None]:
    """With a configuration transformers imports code for generation, a class of which calls torch.compiler.disable, and
    that imports torch's compiler: 95 MB and 0.6 s for what nobody compiles here. That class stays undecorated in this
    process."""
    disable = torch.compiler.disable
    torch.compiler.disable = lambda function=None, *_args, **_settings: function or (lambda inner: inner)
    try:
        yield
    finally:
        torch.compiler.disable = disable


def read_config(folder: Path, hf: Any, biases: Biases, qk_norm: bool) -> ModelConfig:
    """Translate `hf`, a transformers configuration. Raises UnsupportedModel naming the setting that is not served."""
    raw = read_json(folder)
    _refuse_unserved(hf)
    num_heads, num_kv_heads = hf.num_attention_heads, hf.num_key_value_heads
    if num_heads % num_kv_heads:
        raise UnsupportedModel(f"num_attention_heads {num_heads} is not a multiple of {num_kv_heads} key-value heads")
    try:
        rope = read_rope(hf)
    except RopeRefused as error:
        raise UnsupportedModel(str(error)) from error
    except INVALID as error:
        raise UnsupportedModel(f"rope_parameters {hf.rope_parameters!r} are not valid: {error}") from error
    window = _sliding_window(hf)
    context_len, notes = _context_len(raw, hf, rope, window)
    return ModelConfig(
        architecture=hf.architectures[0],
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=rope.head_dim,
        rms_norm_eps=hf.rms_norm_eps,
        rope=rope,
        qkv_bias=biases.qkv,
        output_bias=biases.output,
        mlp_bias=biases.mlp,
        qk_norm=qk_norm,
        tied_head=bool(hf.tie_word_embeddings),
        context_len=context_len,
        notes=notes,
        eos_token_ids=_eos_token_ids(folder, hf),
    )


def _refuse_unserved(hf: Any) -> None:
    if hf.hidden_act != "silu":
        raise UnsupportedModel(f"hidden_act {hf.hidden_act!r} is not supported; only 'silu' is")
    for name, largest in SIZES.items():
        size = getattr(hf, name, None)
        if size is not None and not 1 <= size <= largest:
            raise UnsupportedModel(f"{name} must be at least 1, and at most {largest:,}; found {size}")
    if not 0 <= hf.rms_norm_eps < math.inf:
        raise UnsupportedModel(f"rms_norm_eps must be at least 0, and finite; found {hf.rms_norm_eps}")


def _sliding_window(hf: Any) -> int | None:
    """The window that limits attention in at least one layer, or None."""
    window: int | None = getattr(hf, "sliding_window", None)
    layer_types = getattr(hf, "layer_types", None)
    if window is not None and (type(window) is not int or window < 1):
        raise UnsupportedModel(f"sliding_window must be a whole number of at least 1, or null; found {window!r}")
    if window is None or (layer_types is not None and "sliding_attention" not in layer_types):
        return None
    return window


def _context_len(raw: Mapping[str, Any], hf: Any, rope: RopeConfig, window: int | None) -> tuple[int, tuple[str, ...]]:
    """How many tokens a sequence may have: what the positions were made for, cut where full attention is not exact."""
    context_len: int = hf.max_position_embeddings
    notes: list[str] = []
    if rope.kind == "yarn" and "original_max_position_embeddings" in _raw_rope(raw):
        # YaRN is often switched on by a rope_scaling entry alone, max_position_embeddings still saying the old length.
        context_len = max(context_len, math.floor(rope.factor * rope.original_max_position))
    if rope.kind == "dynamic":
        notes.append(f"dynamic RoPE scaling is not used: it would change no position below {context_len:,} tokens")
    if window is not None and window < context_len:
        notes.append(f"context limited to {window:,} of {context_len:,} tokens, the model's sliding attention window")
        context_len = window
    return context_len, tuple(notes)


def _raw_rope(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    return raw.get("rope_parameters") or raw.get("rope_scaling") or {}


def _eos_token_ids(folder: Path, hf: Any) -> tuple[int, ...]:
    """The ids that end an answer: generation_config.json's when it names some, else config.json's."""
    path = folder / "generation_config.json"
    found: Any = None
    if path.is_file():
        try:
            found = json.loads(path.read_text()).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise UnsupportedModel(f"{path} cannot be read: {error}") from error
    found = hf.eos_token_id if found is None else found
    if found is None:
        return ()
    ids = found if isinstance(found, list) else [found]
    if any(type(token) is not int for token in ids):
        raise UnsupportedModel(f"{path}: eos_token_id must be a token id or a list of them, found {found!r}")
    # Some checkpoints name an id that the vocabulary does not have: it can never be generated, so it ends nothing.
    return tuple(token for token in ids if 0 <= token < hf.vocab_size)
