"""compressed-tensors checkpoints in the "pack-quantized" format, as llm-compressor writes them.

    w[n, k] = weight_scale[n, g] * (q[n, k] - z[n, g]),   g = weight_g_idx[k], else k // G

    weight_packed      [out, ceil(in * bits / 32)]      int32, codes along the row, lowest bits first
    weight_scale       [out, groups], [out, 1] or [1]   strategy group, channel or tensor
    weight_zero_point  [ceil(out * bits / 32), groups]  int32, packed along the outputs; int8 and unpacked for a tensor
    weight_g_idx       [in]                             int32, only with actorder "group"; -1 means unset
    weight_shape       [2]                              int64, (out, in)

q and z are signed and stored as value + 2^(bits-1), which cancels in q - z, so the unsigned codes are used as stored.
Widths that do not divide 32 are refused: some releases leave bits of a word unused, others do not (0.19 does not), and
a checkpoint does not say which.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from engine.checkpoint.codes import input_order, num_words, reorder_codes, words_to_stream, words_to_zeros
from engine.checkpoint.errors import FormatRefused, TensorError
from engine.checkpoint.linear import present, read_bias, read_dense, read_settings
from engine.checkpoint.source import FLOATS, Source
from kernels.linear.affine.layout import AffineWeights
from kernels.linear.transforms import Permutation
from kernels.linear.weights import LinearWeights

PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape", "bias", "weight")
FORMAT = "pack-quantized"
WHERE = "compressed-tensors config"
INFORMATIONAL = frozenset(
    {
        "global_compression_ratio",
        "provider",
        "quant_method",
        "quantization_status",
        "version",
    }
)
INFORMATIONAL_FOR_WEIGHTS = frozenset(
    {
        "actorder",
        "observer",
        "observer_kwargs",
        "scale_dtype",
        "zp_dtype",
    }
)
INTEGERS = (torch.int32, torch.int64)


class _Settings(msgspec.Struct, frozen=True):
    config_groups: dict[str, dict[str, Any]]
    format: str
    ignore: list[str] | None = None
    sparsity_config: dict[str, Any] | None = None


class _GroupSettings(msgspec.Struct, frozen=True):
    targets: list[str]
    weights: dict[str, Any]
    format: str | None = None


class _WeightSettings(msgspec.Struct, frozen=True):
    num_bits: Literal[2, 4, 8]
    type: Literal["int"] = "int"
    symmetric: bool = True
    group_size: int | None = None
    strategy: Literal["group", "channel", "tensor"] | None = None


@dataclass(frozen=True)
class _Group:
    """What holds for the layers that one config group targets."""

    targets: tuple[str, ...]
    bits: int
    symmetric: bool
    strategy: str
    group_size: int | None  # of the strategy "group"


@dataclass(frozen=True)
class CompressedTensors:
    """The reader of pack-quantized checkpoints."""

    groups: tuple[_Group, ...]
    ignore: tuple[str, ...]
    name: str = "compressed-tensors"

    def describe(self) -> str:
        sizes = (
            f"g{group.group_size}" if group.strategy == "group" else f"per {group.strategy}" for group in self.groups
        )
        kinds = (f"{group.bits}-bit {size}" for group, size in zip(self.groups, sizes, strict=True))
        return "compressed-tensors " + ", ".join(dict.fromkeys(kinds))

    def tensor_names(self, source: Source, name: str) -> tuple[str, ...]:
        return present(source, name, PARTS)

    def linear(self, source: Source, name: str, shape: tuple[int, int], bias: bool) -> LinearWeights:
        group = self._group_of(name)
        if group is None:
            if f"{name}.weight_packed" in source:
                raise FormatRefused(f"{WHERE}: {name} is ignored or untargeted, but stored as weight_packed")
            return read_dense(source, name, shape, bias)
        out_features, in_features = shape
        group_size = min(group.group_size or in_features, in_features)
        num_groups = -(-in_features // group_size)
        words = num_words(in_features, group.bits)
        packed = source.take(f"{name}.weight_packed", (out_features, words), (torch.int32,))
        _check_shape(source, f"{name}.weight_shape", shape)
        codes = words_to_stream(packed, group.bits, in_features)  # [out, in * bits / 8]
        order = _order(source, f"{name}.weight_g_idx", in_features, group_size)  # [in] or None
        if order is not None:
            codes = reorder_codes(codes, group.bits, order)
        stored = (1,) if group.strategy == "tensor" else (out_features, num_groups)
        scales = source.take(f"{name}.weight_scale", stored, FLOATS)
        weights = AffineWeights(
            bits=group.bits,
            in_features=in_features,
            group_size=group_size,
            codes=codes,
            scales=scales.expand(out_features, num_groups).contiguous(),
            zeros=_zeros(source, name, group, (out_features, num_groups)),
        )
        pre = () if order is None else (Permutation(order),)
        return LinearWeights((weights,), pre, read_bias(source, name, out_features, bias))

    def _group_of(self, name: str) -> _Group | None:
        """The group that targets the layer: by name, else by pattern, else as a Linear; None when it is ignored."""
        if any(_named(name, ignored) or _matched(name, ignored) or ignored == "Linear" for ignored in self.ignore):
            return None
        for hits in (_named, _matched, _is_linear):
            for group in self.groups:
                if any(hits(name, target) for target in group.targets):
                    return group
        return None


def read_config(config: Mapping[str, Any]) -> CompressedTensors:
    """Build the reader from a quantization config. Raises FormatRefused naming the setting that is not supported."""
    settings = read_settings(config, _Settings, INFORMATIONAL, WHERE)
    sparsity = (settings.sparsity_config or {}).get("format", "dense")
    if sparsity != "dense":
        raise FormatRefused(f"{WHERE}: sparsity_config with format {sparsity!r} is not supported; save it dense")
    groups = tuple(_group(name, group, settings.format) for name, group in settings.config_groups.items())
    ignore = tuple(settings.ignore or ())
    for pattern in [*ignore, *(target for group in groups for target in group.targets)]:
        _check_pattern(pattern)
    return CompressedTensors(groups, ignore)


def _group(name: str, config: Mapping[str, Any], default_format: str) -> _Group:
    """One config group. Weights only: activations that are quantized as well are refused by read_settings."""
    where = f"{WHERE}: {name}"
    settings = read_settings(config, _GroupSettings, (), where)
    layout = settings.format or default_format
    if layout != FORMAT:
        raise FormatRefused(f"{where}: format {layout!r} is not supported, only {FORMAT!r} is")
    weights = read_settings(settings.weights, _WeightSettings, INFORMATIONAL_FOR_WEIGHTS, f"{where}.weights")
    size = weights.group_size
    strategy = weights.strategy or ("tensor" if size is None else "channel" if size == -1 else "group")
    if strategy == "group" and (size is None or size < 1):
        raise FormatRefused(f"{where}.weights: strategy group needs a positive group_size, found {size}")
    return _Group(
        targets=tuple(settings.targets),
        bits=weights.num_bits,
        symmetric=weights.symmetric,
        strategy=strategy,
        group_size=size if strategy == "group" else None,
    )


def _check_pattern(target: str) -> None:
    try:
        re.compile(target.removeprefix("re:"))
    except re.error as error:
        raise FormatRefused(f"{WHERE}: {target!r} is not a regular expression: {error}") from error


def _named(name: str, target: str) -> bool:
    return name == target


def _matched(name: str, target: str) -> bool:
    return target.startswith("re:") and re.match(target.removeprefix("re:"), name) is not None


def _is_linear(name: str, target: str) -> bool:
    return target == "Linear"


def _check_shape(source: Source, key: str, shape: tuple[int, int]) -> None:
    stored = tuple(source.take(key, (2,), INTEGERS).tolist())
    if stored != shape:
        raise TensorError(f"tensor {key!r} holds {list(stored)}, expected {list(shape)}")


def _order(source: Source, key: str, in_features: int, group_size: int) -> Tensor | None:
    if key not in source:
        return None
    g_idx = source.take(key, (in_features,), INTEGERS)
    return None if (g_idx == -1).any() else input_order(g_idx, group_size, key)


def _zeros(source: Source, name: str, group: _Group, shape: tuple[int, int]) -> Tensor:
    """Unsigned zero points, [out, groups] uint8; the middle of the range when the checkpoint stores none."""
    out_features, num_groups = shape
    key, middle = f"{name}.weight_zero_point", 1 << (group.bits - 1)
    if group.symmetric and key not in source:
        return torch.full((1, 1), middle, dtype=torch.uint8).expand(shape)
    if key in source and source.dtype(key) == torch.int32:
        packed = source.take(key, (num_words(out_features, group.bits), num_groups), (torch.int32,))
        return words_to_zeros(packed.t(), group.bits, out_features)
    stored = (1,) if group.strategy == "tensor" else shape
    signed = source.take(key, stored, (torch.int8,)).short()
    if (signed.abs() > middle).any():
        raise TensorError(f"tensor {key!r} holds zero points beyond the {group.bits}-bit range")
    return (signed + middle).to(torch.uint8).expand(shape)
