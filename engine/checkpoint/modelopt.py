"""Checkpoints of NVIDIA's ModelOpt: FP8 and NVFP4, described in config.json or in hf_quant_config.json.

FP8                        w = weight * weight_scale                     weight e4m3, scale []
FP8_PER_CHANNEL_PER_TOKEN  likewise                                      scale [out]
NVFP4, W4A16_NVFP4         w = table[code] * weight_scale * weight_scale_2

weight          [out, in] e4m3, or [out, in / 2] uint8 with two e2m1 codes a byte, the first channel low
weight_scale_2  [] float32, multiplied (compressed-tensors stores its reciprocal); weight_scale is then e4m3
input_scale     [] float32, of activations: of e4m3, or the unit of the e4m3 scales of 16 e2m1 channels
pre_quant_scale [in], what activations are multiplied by first (AWQ, SmoothQuant)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from engine.checkpoint.errors import FormatRefused, TensorError
from engine.checkpoint.linear import present, read_bias, read_dense, read_settings, take_scalar, take_scales
from engine.checkpoint.source import Source
from kernels.linear.fp8.layout import Fp8Weights
from kernels.linear.rounding import Rounding
from kernels.linear.table.layout import TableWeights
from kernels.linear.table.tables import E2M1
from kernels.linear.transforms import Diagonal, Transform
from kernels.linear.weights import LinearWeights, Term

CACHE_PARTS = ("k_scale", "v_scale", "q_scale")
WHERE = "ModelOpt config"
# config_groups repeats quant_algo; layers that stay dense have no scale.
INFORMATIONAL = frozenset({"quant_method", "producer", "ignore", "exclude_modules", "config_groups", "targets"})
FP8, FP8_TOKEN = "FP8", "FP8_PER_CHANNEL_PER_TOKEN"
NVFP4 = ("NVFP4", "NVFP4_AWQ")
NVFP4_WEIGHTS_ONLY = "W4A16_NVFP4"
ALGORITHMS = (FP8, FP8_TOKEN, *NVFP4, NVFP4_WEIGHTS_ONLY)
MIXED = "MIXED_PRECISION"
GROUP = 16


class _Settings(msgspec.Struct, frozen=True):
    quant_algo: str
    kv_cache_quant_algo: str | None = None
    kv_cache_scheme: dict[str, Any] | None = None
    group_size: int | None = None
    has_zero_point: bool = False
    pre_quant_scale: bool = False
    quantized_layers: dict[str, dict[str, Any]] | None = None


@dataclass(frozen=True)
class ModelOpt:
    """The reader of ModelOpt checkpoints."""

    algorithm: str  # of ALGORITHMS, of every layer that `layers` does not name
    layers: Mapping[str, str]  # layer -> algorithm, where they differ
    has_cache_scales: bool
    name: str = "modelopt"

    def describe(self) -> str:
        kinds = ", ".join(dict.fromkeys(self.layers.values())) or self.algorithm
        unused = "; its scales of a quantized KV cache are not used" if self.has_cache_scales else ""
        return f"ModelOpt {kinds}{unused}"

    def linear(self, source: Source, name: str, shape: tuple[int, int], bias: bool) -> LinearWeights:
        if self.has_cache_scales:
            for key in present(source, name, CACHE_PARTS):
                source.tensor(key)  # the cache is quantized as the server is told to
        if f"{name}.weight_scale" not in source:
            return read_dense(source, name, shape, bias)
        algorithm = self.layers.get(name, self.algorithm)
        if algorithm == MIXED:
            raise FormatRefused(f"{WHERE}: {name} is quantized, but quantized_layers does not say how")
        try:
            term = _fp8(source, name, shape, algorithm) if algorithm.startswith("FP8") else _nvfp4(source, name, shape)
        except ValueError as error:
            raise error if isinstance(error, TensorError) else TensorError(f"{name}.weight: {error}") from error
        pre = _scaled(source, name, shape[1]) + _rounded(source, name, algorithm)
        return LinearWeights((term,), pre, read_bias(source, name, shape[0], bias))


def read_config(config: Mapping[str, Any]) -> ModelOpt:
    """Build the reader from a quantization config. Raises FormatRefused naming the setting that is not supported."""
    whole = config | config["quantization"] if isinstance(config.get("quantization"), Mapping) else config
    settings = read_settings(
        {key: value for key, value in whole.items() if key != "quantization"}, _Settings, INFORMATIONAL, WHERE
    )
    layers = {name: str(layer.get("quant_algo")) for name, layer in (settings.quantized_layers or {}).items()}
    sizes = [settings.group_size, *(layer.get("group_size") for layer in (settings.quantized_layers or {}).values())]
    if settings.quant_algo != MIXED or not layers:
        layers |= {"": settings.quant_algo}
    for algorithm in layers.values():
        if algorithm not in ALGORITHMS:
            raise FormatRefused(
                f"{WHERE}: quant_algo {algorithm!r} is not supported; supported are {', '.join(ALGORITHMS)}"
            )
    if any(size not in (None, GROUP) for size in sizes):
        raise FormatRefused(f"{WHERE}: group_size {sizes} is not supported: NVFP4 has groups of {GROUP}")
    if settings.has_zero_point:
        raise FormatRefused(f"{WHERE}: has_zero_point = True is not supported: floats have none")
    layers.pop("", None)
    has_cache_scales = bool(settings.kv_cache_quant_algo or settings.kv_cache_scheme)
    return ModelOpt(settings.quant_algo, layers, has_cache_scales)


def _fp8(source: Source, name: str, shape: tuple[int, int], algorithm: str) -> Term:
    weight = source.take(f"{name}.weight", shape, (torch.float8_e4m3fn,))
    if algorithm == FP8:
        return Fp8Weights(weight, take_scalar(source, f"{name}.weight_scale").view(1, 1), shape)
    scales = take_scales(source, f"{name}.weight_scale", (shape[0],))
    return Fp8Weights(weight, scales.unsqueeze(1), (1, shape[1]))


def _nvfp4(source: Source, name: str, shape: tuple[int, int]) -> Term:
    out_features, in_features = shape
    codes = source.take(f"{name}.weight", (out_features, -(-in_features // 2)), (torch.uint8,))
    groups = (out_features, -(-in_features // GROUP))
    scales = take_scales(source, f"{name}.weight_scale", groups, (torch.float8_e4m3fn,))
    factor = float(take_scalar(source, f"{name}.weight_scale_2"))
    return TableWeights(4, in_features, GROUP, codes, scales, E2M1, factor)


def _scaled(source: Source, name: str, in_features: int) -> tuple[Transform, ...]:
    key = f"{name}.pre_quant_scale"
    return (Diagonal(take_scales(source, key, (in_features,))),) if key in source else ()


def _rounded(source: Source, name: str, algorithm: str) -> tuple[Transform, ...]:
    if algorithm == FP8_TOKEN:
        return (Rounding("e4m3", 8),)
    if algorithm == NVFP4_WEIGHTS_ONLY:
        return ()
    scale = take_scalar(source, f"{name}.input_scale")
    if algorithm == FP8:
        return (Rounding("e4m3", 8, scale=scale),)
    return (Rounding("e2m1", 4, GROUP, scale_grid="e4m3", scale_unit=scale),)
