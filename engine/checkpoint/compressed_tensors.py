"""compressed-tensors checkpoints, as llm-compressor writes them: which config group holds for a layer, and how.

How the tensors of a layer are laid out is in compressed_layouts.py, rotations in compressed_transforms.py.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import torch

from engine.checkpoint.compressed_layouts import READERS, Layer, Scheme
from engine.checkpoint.compressed_transforms import LINEAR, Rotations, check_pattern, matches, read_rotations
from engine.checkpoint.errors import FormatRefused, TensorError
from engine.checkpoint.linear import present, read_bias, read_dense, read_settings, take_scalar
from engine.checkpoint.source import Source
from kernels.linear.rounding import Rounding
from kernels.linear.weights import LinearWeights

WHERE = "compressed-tensors config"
INFORMATIONAL = frozenset({"global_compression_ratio", "provider", "quant_method", "quantization_status", "version"})
INFORMATIONAL_FOR_VALUES = frozenset({"actorder", "observer", "observer_kwargs", "zp_dtype"})
LAYOUTS = {  # what each layout may say of its weights: (type, bits), strategies
    "pack-quantized": ({("int", bits) for bits in range(2, 9)}, ("group", "channel", "tensor")),
    "int-quantized": ({("int", bits) for bits in range(2, 9)}, ("group", "channel", "tensor")),
    "float-quantized": ({("float", 8)}, ("group", "channel", "tensor", "block")),
    "nvfp4-pack-quantized": ({("float", 4)}, ("group",)),
    "mxfp4-pack-quantized": ({("float", 4)}, ("group",)),
    "mxfp8-quantized": ({("float", 8)}, ("group",)),
}
POWERS_OF_TWO = "torch.uint8"  # scale_dtype of MXFP4 and MXFP8
CACHE_PARTS = ("q_scale", "k_scale", "v_scale", "k_zero_point", "v_zero_point", "k_global_scale", "v_global_scale")


class _Settings(msgspec.Struct, frozen=True):
    config_groups: dict[str, dict[str, Any]]
    format: str
    ignore: list[str] | None = None
    sparsity_config: dict[str, Any] | None = None
    transform_config: dict[str, Any] | None = None
    kv_cache_scheme: dict[str, Any] | None = None


class _GroupSettings(msgspec.Struct, frozen=True):
    targets: list[str]
    weights: dict[str, Any]
    input_activations: dict[str, Any] | None = None
    format: str | None = None


class _Values(msgspec.Struct, frozen=True):
    """How weights or activations are quantized."""

    num_bits: int
    type: Literal["int", "float"] = "int"
    symmetric: bool = True
    group_size: int | None = None
    strategy: Literal["group", "tensor_group", "channel", "token", "tensor", "block"] | None = None
    block_structure: list[int] | str | None = None
    dynamic: bool | str = False
    scale_dtype: str | None = None

    @property
    def by(self) -> str:
        """The strategy, which old configs leave to the group size. tensor_group is group with one more scale."""
        size = self.group_size
        named = self.strategy or ("tensor" if size is None else "channel" if size == -1 else "group")
        return "group" if named == "tensor_group" else named


@dataclass(frozen=True)
class _Group:
    """What holds for the layers that one config group targets."""

    targets: tuple[str, ...]
    layout: str  # one of READERS
    scheme: Scheme
    activations: _Values | None

    def describe(self) -> str:
        rounded = self.activations
        if rounded is None:
            return self.scheme.describe()
        return f"{self.scheme.describe()} with {rounded.num_bits}-bit {rounded.type} activations"


@dataclass(frozen=True)
class CompressedTensors:
    """The reader of compressed-tensors checkpoints."""

    groups: tuple[_Group, ...]
    ignore: tuple[str, ...]
    rotations: Rotations
    has_cache_scales: bool = False
    name: str = "compressed-tensors"

    def describe(self) -> str:
        kinds = ", ".join(dict.fromkeys(group.describe() for group in self.groups))
        unused = "; its scales of a quantized KV cache are not used" if self.has_cache_scales else ""
        return f"compressed-tensors {kinds}{self.rotations.describe()}{unused}"

    def linear(self, source: Source, name: str, shape: tuple[int, int], bias: bool) -> LinearWeights:
        self._pass_cache_scales(source, name)
        group = self._group_of(name)
        if group is None:
            for part in ("weight_packed", "weight_scale"):
                if f"{name}.{part}" in source:
                    raise FormatRefused(f"{WHERE}: {name} is ignored or untargeted, but stored as {part}")
            dense = read_dense(source, name, shape, bias)
            return self.rotations.around(source, name, dense)
        rounding = None if group.activations is None else _rounding(source, name, group.activations)
        read = READERS[group.layout](Layer(source, name, shape, group.scheme, rounding))
        weights = LinearWeights((read.term,), read.pre, read_bias(source, name, shape[0], bias))
        return self.rotations.around(source, name, weights)

    def _group_of(self, name: str) -> _Group | None:
        """The group that targets the layer: by name, else by pattern, else as a Linear; None when it is ignored."""
        if any(matches(name, ignored) for ignored in self.ignore):
            return None
        for kind in (_is_name, _is_pattern, _is_class):
            for group in self.groups:
                if any(kind(target) and matches(name, target) for target in group.targets):
                    return group
        return None

    def _pass_cache_scales(self, source: Source, name: str) -> None:
        """The cache is quantized as the server is told to; scales that a checkpoint brings for its own are left."""
        module = name.rsplit(".", 1)[0]
        for key in present(source, module, CACHE_PARTS if self.has_cache_scales else ()):
            source.tensor(key)


def read_config(config: Mapping[str, Any]) -> CompressedTensors:
    """Build the reader from a quantization config. Raises FormatRefused naming the setting that is not supported."""
    settings = read_settings(config, _Settings, INFORMATIONAL, WHERE)
    sparsity = (settings.sparsity_config or {}).get("format", "dense")
    if sparsity != "dense":
        raise FormatRefused(f"{WHERE}: sparsity_config with format {sparsity!r} is not supported; save it dense")
    groups = tuple(_group(name, group, settings.format) for name, group in settings.config_groups.items())
    ignore = tuple(settings.ignore or ())
    for pattern in [*ignore, *(target for group in groups for target in group.targets)]:
        check_pattern(pattern, WHERE)
    rotations = read_rotations(settings.transform_config or {}, f"{WHERE}: transform_config")
    return CompressedTensors(groups, ignore, rotations, bool(settings.kv_cache_scheme))


def _group(name: str, config: Mapping[str, Any], default_format: str) -> _Group:
    """One config group. Output activations that are quantized are refused by read_settings."""
    where = f"{WHERE}: {name}"
    settings = read_settings(config, _GroupSettings, (), where)
    weights = read_settings(settings.weights, _Values, INFORMATIONAL_FOR_VALUES, f"{where}.weights")
    layout = settings.format or default_format
    if layout == "naive-quantized":
        layout = "int-quantized" if weights.type == "int" else "float-quantized"
    if layout not in READERS:
        raise FormatRefused(f"{where}: format {layout!r} is not supported, only {', '.join(READERS)} are")
    scheme = _scheme(weights, layout, f"{where}.weights")
    activations = None
    if settings.input_activations:
        place = f"{where}.input_activations"
        activations = read_settings(settings.input_activations, _Values, INFORMATIONAL_FOR_VALUES, place)
        _check_activations(activations, place)
    return _Group(tuple(settings.targets), layout, scheme, activations)


def _scheme(weights: _Values, layout: str, where: str) -> Scheme:
    """Raises FormatRefused for weights that the layout cannot hold."""
    kinds, strategies = LAYOUTS[layout]
    if (weights.type, weights.num_bits) not in kinds:
        raise FormatRefused(
            f"{where}: {layout} weights of {weights.num_bits} bits and type {weights.type!r} are not supported"
        )
    if weights.by not in strategies:
        raise FormatRefused(f"{where}: strategy {weights.by!r} is not supported for {layout} weights")
    if weights.dynamic:
        raise FormatRefused(f"{where}: dynamic = {weights.dynamic!r} is not supported: weights have fixed scales")
    if not weights.symmetric and weights.type == "float":
        raise FormatRefused(f"{where}: symmetric = False is not supported for floats")
    size = weights.group_size
    if weights.by == "group" and (size is None or size < 1):
        raise FormatRefused(f"{where}: strategy group needs a positive group_size, found {size}")
    return Scheme(
        bits=weights.num_bits,
        is_float=weights.type == "float",
        symmetric=weights.symmetric,
        strategy=weights.by,
        group_size=size if weights.by == "group" else None,
        block=_block(weights.block_structure, where) if weights.by == "block" else None,
    )


def _block(structure: list[int] | str | None, where: str) -> tuple[int, int]:
    """[128, 128], or "128x128" as old releases wrote it."""
    sides = structure.split("x") if isinstance(structure, str) else structure or []
    if len(sides) != 2 or not all(re.fullmatch("[1-9][0-9]{0,8}", str(side)) for side in sides):
        raise FormatRefused(f"{where}: block_structure must be two positive numbers, found {structure!r}")
    return int(sides[0]), int(sides[1])


def _check_activations(values: _Values, where: str) -> None:
    """Raises FormatRefused for roundings that are not served."""
    if (values.type, values.num_bits) not in {("int", 4), ("int", 8), ("float", 8), ("float", 4)}:
        raise FormatRefused(f"{where}: {values.num_bits} bits of type {values.type!r} are not supported")
    if values.by == "tensor" and values.dynamic:
        raise FormatRefused(
            f"{where}: strategy 'tensor' with dynamic = True is not supported: a token's result would depend on the "
            "requests beside it. Quantize activations by token"
        )
    if values.by not in ("token", "tensor", "group") or (values.by != "tensor" and not values.dynamic):
        raise FormatRefused(f"{where}: strategy {values.by!r} with dynamic = {values.dynamic!r} is not supported")
    if values.by == "group" and (values.group_size is None or values.group_size < 1):
        raise FormatRefused(f"{where}: strategy group needs a positive group_size, found {values.group_size}")
    if not values.symmetric and values.type == "float":
        raise FormatRefused(f"{where}: symmetric = False is not supported for floats")


def _rounding(source: Source, name: str, values: _Values) -> Rounding:
    """How the layer's activations are rounded. Raises TensorError when a fixed scale or zero is missing or useless."""
    grid: Literal["int", "e4m3", "e2m1"] = "int"
    if values.type == "float":
        grid = "e4m3" if values.num_bits == 8 else "e2m1"
    if values.by == "tensor":
        scale, zero = take_scalar(source, f"{name}.input_scale"), None
        if not values.symmetric:
            zero = source.take(f"{name}.input_zero_point", (1,), (torch.int8,)).float()
        try:
            return Rounding(grid, values.num_bits, scale=scale, zero=zero)
        except ValueError as error:
            raise TensorError(f"{name}.input_zero_point: {error}") from error
    channels = values.group_size if values.by == "group" else None
    if values.dynamic == "local":
        unit = 1 / take_scalar(source, f"{name}.input_global_scale")  # stored as a divisor
        return Rounding(grid, values.num_bits, channels, scale_grid="e4m3", scale_unit=unit)
    powers = values.scale_dtype == POWERS_OF_TWO
    return Rounding(grid, values.num_bits, channels, values.symmetric, scale_grid="e8m0" if powers else "float")


def _is_class(target: str) -> bool:
    return target == LINEAR


def _is_pattern(target: str) -> bool:
    return target.startswith("re:")


def _is_name(target: str) -> bool:
    return not _is_class(target) and not _is_pattern(target)
