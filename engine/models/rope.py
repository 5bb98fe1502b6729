"""How fast each channel pair of a head turns with position, for the RoPE variants of Hugging Face configurations.

    angle[p, i] = p * inv_freq[i]         base: inv_freq[i] = theta^(-2 i / D)

    default   base
    linear    base / factor
    llama3    long wavelengths divided by factor, short ones kept, a linear ramp between
    yarn      likewise over the channel index, and cos and sin multiplied by attention_factor
    factors   base / factors[i], one given for each pair: how GGUF files store llama3
    dynamic   base: the variant stretches theta only beyond max_position_embeddings, as a function of the length a
              sequence has reached. Keys stored earlier keep their old angles, so the result would depend on how the
              prompt was cut; sequences end at max_position_embeddings instead

Everything is computed in float32 in transformers' order of operations: an angle at position 100,000 inherits 100,000
times the rounding of inv_freq, so another order would be another model.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")  # of Hugging Face configurations


class RopeRefused(ValueError):
    """The RoPE variant is not served; the message names it and those that are, or the number that makes no sense."""


@dataclass(frozen=True)
class RopeConfig:
    """One RoPE variant. Fields that a kind does not read keep their defaults."""

    kind: str  # one of KINDS, or "factors"
    theta: float
    head_dim: int
    factor: float = 1.0
    original_max_position: int = 0  # tokens the model was trained on before scaling (llama3, yarn)
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: whether the ends of the ramp are whole channels
    attention_factor: float = 1.0  # yarn: multiplies cos and sin
    factors: tuple[float, ...] = ()  # factors

    def __post_init__(self) -> None:
        """Raises RopeRefused for numbers that make no angles."""
        for name, value, least in (
            ("rope_theta", self.theta, 1),
            ("factor", self.factor, 0),
            ("original_max_position_embeddings", self.original_max_position, -1),
            ("low_freq_factor", self.low_freq_factor, 0),
            ("high_freq_factor", self.high_freq_factor, self.low_freq_factor),
            ("beta_fast", self.beta_fast, 0),
            ("beta_slow", self.beta_slow, 0),
            ("attention_factor", self.attention_factor, 0),
        ):
            if not least < value < math.inf:
                raise RopeRefused(f"{name} of RoPE must be more than {least}, and finite; found {value}")


def read_rope(hf: Any) -> RopeConfig:
    """Translate the rope_parameters of a transformers configuration. Raises RopeRefused."""
    parameters = dict(hf.rope_parameters)
    if any(isinstance(value, dict) for value in parameters.values()):
        raise RopeRefused("RoPE parameters that differ between layers are not supported")
    kind = parameters["rope_type"]
    if kind not in KINDS:
        raise RopeRefused(f"RoPE type {kind!r} is not supported; supported are {', '.join(KINDS)}")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise RopeRefused(f"partial_rotary_factor {parameters['partial_rotary_factor']} is not supported; only 1.0 is")
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    if head_dim % 2:
        raise RopeRefused(f"head_dim {head_dim} is odd: RoPE turns pairs of channels")
    original = int(parameters.get("original_max_position_embeddings") or hf.max_position_embeddings)
    factor = _number(parameters, "factor", hf.max_position_embeddings / original)
    return RopeConfig(
        kind=kind,
        theta=float(parameters["rope_theta"]),
        head_dim=head_dim,
        factor=factor,
        original_max_position=original,
        low_freq_factor=_number(parameters, "low_freq_factor", 1.0),
        high_freq_factor=_number(parameters, "high_freq_factor", 4.0),
        beta_fast=_number(parameters, "beta_fast", 32.0),
        beta_slow=_number(parameters, "beta_slow", 1.0),
        truncate=bool(parameters.get("truncate", True)),
        attention_factor=_attention_factor(parameters, factor) if kind == "yarn" else 1.0,
    )


def _number(parameters: dict[str, Any], name: str, default: float) -> float:
    value = parameters.get(name)
    return default if value is None else float(value)


def inverse_frequencies(rope: RopeConfig) -> Tensor:
    """Return radians per position of each channel pair, [head_dim / 2] float32."""
    exponents = torch.arange(0, rope.head_dim, 2, dtype=torch.float32) / rope.head_dim  # [D / 2]
    periods = rope.theta**exponents  # positions in one radian
    if rope.kind == "linear":
        return 1.0 / periods / rope.factor
    if rope.kind == "llama3":
        return _llama3(1.0 / periods, rope)
    if rope.kind == "yarn":
        return _yarn(periods, rope)
    if rope.kind == "factors":
        return 1.0 / periods / torch.tensor(rope.factors)
    return 1.0 / periods


def _llama3(inv_freq: Tensor, rope: RopeConfig) -> Tensor:
    low, high, trained = rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position
    wavelength = 2 * math.pi / inv_freq  # [D / 2] positions in one turn
    is_long = wavelength > trained / low
    is_medium = ~is_long & ~(wavelength < trained / high)
    smooth = (trained / wavelength - low) / (high - low)
    scaled = torch.where(is_long, inv_freq / rope.factor, inv_freq)
    return torch.where(is_medium, (1 - smooth) * scaled / rope.factor + smooth * scaled, scaled)


def _yarn(periods: Tensor, rope: RopeConfig) -> Tensor:
    low = _channel_that_turns(rope.beta_fast, rope)
    high = _channel_that_turns(rope.beta_slow, rope)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.head_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp
    ramp = (torch.arange(rope.head_dim // 2, dtype=torch.float32) - low) / (high - low)  # [D / 2]
    kept = 1 - ramp.clamp(0, 1)
    return 1.0 / (rope.factor * periods) * (1 - kept) + 1.0 / periods * kept


def _channel_that_turns(num_turns: float, rope: RopeConfig) -> float:
    """The (fractional) channel pair that makes `num_turns` turns over the trained length."""
    trained = rope.original_max_position
    return rope.head_dim * math.log(trained / (num_turns * 2 * math.pi)) / (2 * math.log(rope.theta))


def _attention_factor(parameters: dict[str, Any], factor: float) -> float:
    """YaRN's temperature: given, or 0.1 ln(factor) + 1, or the ratio of two of those scaled by mscale."""
    given = parameters.get("attention_factor")
    if given is not None:
        return float(given)

    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, mscale_all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return temperature(mscale) / temperature(mscale_all_dim)
    return temperature(1.0)
