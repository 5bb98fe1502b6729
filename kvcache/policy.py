"""The names of cache policies, and what each means for every layer.

    f16  f32                     floating point throughout; f32 is the oracle of tests
    kXvY                         keys in X bits, values in Y: 16, 8, 4, 3, 2 or 1.5; Hadamard rotation, no calibration
    skvq:kXvY                    the same with the channel order, clips and scales of a calibration artifact when the
                                 model has one (kvcache/calibration.py), and the rotation when it has none
    ...:gN                       groups of N channels share a scale and a zero (64 for heads of 128, 32 for heads of 64)
    ...:wN  ...:sN               the last N tokens (128; up to 512) and the first N (4; up to 64) stay in high precision
    ...:plain                    channels as they are: no rotation, no artifact
    .../LAYERS=NAME              other widths for some layers: numbers from 0, or from -1 for the last one

    k4v4        skvq:k2v2:g64:w128:s4        skvq:k2v1.5/0,-1=k4v4/1,2=f16

Options come in any order. Window and sinks are the same in all layers, because every layer must agree on which tokens
can be taken up again; so they are stated in the first part only. No sign in a name means anything to a shell.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kernels.attention.quantized.layout import WIDTHS, LayoutError, RowLayout, name_of, packing_unit

DEFAULT_WINDOW = 128  # tokens
DEFAULT_SINKS = 4  # tokens
MAX_WINDOW = 512  # tokens; it is kept in float16 beside its packed rows, so a longer one gives back what packing saves
MAX_SINKS = 64
LARGEST_DEFAULT_GROUP = 64  # channels

NAMES = "f16, f32, kXvY and skvq:kXvY with X and Y of " + ", ".join(name_of(bits) for bits in WIDTHS)

HADAMARD, PLAIN, CALIBRATED = "hadamard", "plain", "calibrated"  # transforms of a head's channels


class PolicyError(ValueError):
    """The policy is not known or cannot serve the model; the message says which can."""


@dataclass(frozen=True)
class LayerPolicy:
    """How one layer of one model is stored; every choice made."""

    key_bits: float  # 32 and 16, when keys and values have it, are plain floating point
    value_bits: float
    group_size: int  # channels; 0 for floating point
    window: int  # W tokens; 0 for floating point
    num_sinks: int  # S tokens; 0 for floating point
    transform: str  # HADAMARD, PLAIN or CALIBRATED

    @property
    def is_quantized(self) -> bool:
        return min(self.key_bits, self.value_bits) < 16

    @property
    def name(self) -> str:
        """For people: "f16", "k4v2"."""
        keys, values = name_of(self.key_bits), name_of(self.value_bits)
        return f"k{keys}v{values}" if self.is_quantized else f"f{keys}"


@dataclass(frozen=True)
class Widths:
    """What one part of a policy's name says."""

    key_bits: float
    value_bits: float
    group_size: int | None = None  # None: chosen by the size of a head
    calibrated: bool = False  # use an artifact when there is one
    plain: bool = False

    @property
    def is_quantized(self) -> bool:
        return min(self.key_bits, self.value_bits) < 16

    def __str__(self) -> str:
        if not self.is_quantized:
            return f"f{name_of(self.key_bits)}"
        name = f"{'skvq:' if self.calibrated else ''}k{name_of(self.key_bits)}v{name_of(self.value_bits)}"
        group = "" if self.group_size is None else f":g{self.group_size}"
        return name + group + (":plain" if self.plain else "")


@dataclass(frozen=True)
class Policy:
    """How keys and values are stored. Printed with every option but a group that was not stated, in one order."""

    widths: Widths
    window: int = 0  # W tokens
    num_sinks: int = 0  # S tokens
    overrides: tuple[tuple[int, Widths], ...] = ()  # (layer, negative from the end; widths), sorted

    @property
    def is_quantized(self) -> bool:
        return self.widths.is_quantized

    @property
    def is_calibrated(self) -> bool:
        """Whether an artifact would be used where there is one."""
        return any(widths.calibrated for widths in (self.widths, *(widths for _, widths in self.overrides)))

    def __str__(self) -> str:
        if not self.is_quantized:
            return str(self.widths)
        parts = [f"{self.widths}:w{self.window}:s{self.num_sinks}"]
        parts += [f"{layer}={widths}" for layer, widths in self.overrides]
        return "/".join(parts)

    def layers(self, num_layers: int, head_dim: int, has_artifact: bool = False) -> tuple[LayerPolicy, ...]:
        """What each layer of a model does. Raises PolicyError, naming the part that cannot serve the model."""
        chosen = [self.widths] * num_layers
        stated: set[int] = set()
        for layer, widths in self.overrides:
            if not -num_layers <= layer < num_layers:
                raise PolicyError(
                    f"KV cache policy {self}: there is no layer {layer} in a model of {num_layers}; "
                    f"use {-num_layers} to {num_layers - 1}"
                )
            if layer % num_layers in stated:
                raise PolicyError(
                    f"KV cache policy {self}: layer {layer} is stated twice, once from the end; say it once"
                )
            stated.add(layer % num_layers)
            chosen[layer] = widths
        return tuple(self._layer(widths, head_dim, has_artifact) for widths in chosen)

    def _layer(self, widths: Widths, head_dim: int, has_artifact: bool) -> LayerPolicy:
        if not widths.is_quantized:
            return LayerPolicy(widths.key_bits, widths.value_bits, 0, 0, 0, PLAIN)
        group_size = widths.group_size or default_group_size(head_dim)
        for bits in (widths.key_bits, widths.value_bits):
            try:
                RowLayout(bits, head_dim, group_size)
            except LayoutError as error:
                raise PolicyError(
                    f"KV cache policy {widths} cannot serve this model: {error}; {_instead(head_dim)}"
                ) from error
        transform = CALIBRATED if widths.calibrated and has_artifact else HADAMARD
        return LayerPolicy(
            widths.key_bits,
            widths.value_bits,
            group_size,
            self.window,
            self.num_sinks,
            PLAIN if widths.plain else transform,
        )


def read_policy(text: str) -> Policy:
    """The policy called `text`. Raises PolicyError naming the part that is not known, and what is."""
    first, *others = text.split("/")
    widths, shared = _read_part(text, first)
    if not widths.is_quantized:
        if others:
            raise _error(text, f"{widths} holds for all layers; name a quantized policy first, then {others[0]!r}")
        return Policy(widths)
    window, num_sinks = shared.get("w", DEFAULT_WINDOW), shared.get("s", DEFAULT_SINKS)
    if window > MAX_WINDOW:
        raise _error(text, f"a window of {window} tokens is more than {MAX_WINDOW}; f16 reads all in high precision")
    if num_sinks > MAX_SINKS:
        raise _error(text, f"{num_sinks} sinks are more than {MAX_SINKS}")
    return Policy(widths, window, num_sinks, _read_overrides(text, others))


def _read_overrides(text: str, parts: Sequence[str]) -> tuple[tuple[int, Widths], ...]:
    """Each LAYERS=NAME -> (layer, widths), by layer."""
    overrides: dict[int, Widths] = {}
    for part in parts:
        layers, equals, name = part.partition("=")
        if not equals or not re.fullmatch(r"-?\d+(,-?\d+)*", layers):
            raise _error(text, f"{part!r} is not of the form 0,-1=k4v4")
        override, shared = _read_part(text, name)
        if shared:
            raise _error(text, f"window and sinks hold for all layers; state them before the first /, not in {part!r}")
        if override.key_bits == 32:
            raise _error(text, "f32 is for a whole cache; layers of full precision are f16")
        for layer in map(int, layers.split(",")):
            if layer in overrides:
                raise _error(text, f"layer {layer} is stated twice; say it once")
            overrides[layer] = override
    return tuple(sorted(overrides.items(), key=lambda item: item[0]))


def default_group_size(head_dim: int) -> int:
    """64 for heads of 128, 32 for 64: the largest divisor of a head up to half of it and 64, if possible one that fills
    vectors of 8 channels."""
    largest = min(LARGEST_DEFAULT_GROUP, max(1, head_dim // 2))
    divisors = [size for size in range(1, largest + 1) if head_dim % size == 0]
    return max(divisors, key=lambda size: (size % 8 == 0, size))


def _instead(head_dim: int) -> str:
    widths = ", ".join(name_of(bits) for bits in WIDTHS if head_dim % packing_unit(bits) == 0)
    return f"heads of {head_dim} channels can have {widths} bits and groups such as {default_group_size(head_dim)}"


def _read_part(text: str, part: str) -> tuple[Widths, dict[str, int]]:
    """[skvq:]name[:option...] -> widths, and the window "w" and sinks "s" that were stated."""
    calibrated = part.startswith("skvq:")
    name, *options = part.removeprefix("skvq:").split(":")
    numbers: dict[str, int] = {}
    for option in options:
        match = re.fullmatch(r"([gws])(\d{1,6})|(plain)", option)
        if match is None:
            known = "gN (channels in a group), wN (window), sN (sinks) or plain (no rotation)"
            raise _error(text, f"option {option!r} is not known: use {known}")
        key = match[1] or match[3]
        if key in numbers:
            raise _error(text, f"{option!r} states one option a second time; say it once")
        numbers[key] = int(match[2] or 1)
    if name in ("f16", "f32") and not calibrated:
        if options:
            raise _error(text, f"{name} has no options, found {options[0]!r}")
        return Widths(float(name[1:]), float(name[1:])), {}
    widths = re.fullmatch(r"k([\d.]+)v([\d.]+)", name)
    by_name = {name_of(bits): bits for bits in WIDTHS}
    if widths is None or widths[1] not in by_name or widths[2] not in by_name:
        raise _error(text, f"{name!r} is not known: use one of {NAMES}, such as k4v4 or skvq:k2v2:w64")
    if widths[1] == widths[2] == "16":
        raise _error(text, f"{name} is f16: use that name")
    if numbers.get("g") == 0:
        raise _error(text, "a group must have at least one channel")
    plain = numbers.pop("plain", 0) == 1
    if calibrated and plain:
        raise _error(text, "plain leaves the artifact unused that skvq asks for; drop one of them")
    group_size = numbers.pop("g", None)
    return Widths(by_name[widths[1]], by_name[widths[2]], group_size, calibrated, plain), numbers


def _error(text: str, message: str) -> PolicyError:
    return PolicyError(f"KV cache policy {text!r}: {message}")
