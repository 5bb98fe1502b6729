"""FP8 checkpoints of DeepSeek, of transformers (FineGrainedFP8) and of AutoFP8: quant_method "fp8".

    w[n, k] = weight[n, k] * weight_scale_inv[n // R, k // C]          weight_block_size [R, C]
    w[n, k] = weight[n, k] * weight_scale                              one for the tensor, under either name

    weight            [out, in]                       e4m3
    weight_scale_inv  [ceil(out / R), ceil(in / C)]   float32, or e8m0: multiplied, whatever its name says
    activation_scale  []                              or input_scale; activation_scheme "static"

Activations are rounded to e4m3 as well: by token and group of C channels, by token alone without blocks, or with the
fixed scale. scale_fmt "ue8m0" makes the scales that follow a group powers of two, rounded up.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import torch

from engine.checkpoint.errors import FormatRefused, TensorError
from engine.checkpoint.linear import present, read_bias, read_dense, read_settings, take_scalar, take_scales
from engine.checkpoint.source import FLOATS, Source
from kernels.linear.fp8.layout import Fp8Weights
from kernels.linear.rounding import Rounding
from kernels.linear.weights import LinearWeights

SCALES, INPUT_SCALES = ("weight_scale_inv", "weight_scale"), ("activation_scale", "input_scale")
WHERE = "fp8 config"
# Layers that stay dense have no scale; a setting of transformers' own loading.
INFORMATIONAL = frozenset({"quant_method", "modules_to_not_convert", "ignored_layers", "dequantize"})
POWERS_OF_TWO = "ue8m0"


class _Settings(msgspec.Struct, frozen=True):
    activation_scheme: Literal["dynamic", "static"] = "dynamic"
    weight_block_size: tuple[int, int] | None = None
    fmt: Literal["e4m3"] = "e4m3"
    scale_fmt: Literal["float", "ue8m0"] = "float"


@dataclass(frozen=True)
class Fp8:
    """The reader of fp8 checkpoints."""

    block: tuple[int, int] | None  # rows and channels; None: one scale for the tensor
    is_static: bool  # the scale of activations
    powers_of_two: bool  # scales of groups of activations
    name: str = "fp8"

    def describe(self) -> str:
        return "FP8 " + ("per tensor" if self.block is None else f"{self.block[0]}x{self.block[1]}")

    def linear(self, source: Source, name: str, shape: tuple[int, int], bias: bool) -> LinearWeights:
        found = present(source, name, SCALES)
        if not found:
            return read_dense(source, name, shape, bias)
        weight = source.take(f"{name}.weight", shape, (torch.float8_e4m3fn,))
        try:
            if self.block is None:
                weights = Fp8Weights(weight, take_scalar(source, found[0]).view(1, 1), shape)
            else:
                sides = zip(shape, self.block, strict=True)
                grid = tuple(-(-size // side) for size, side in sides)
                scales = take_scales(source, found[0], grid, (*FLOATS, torch.float8_e8m0fnu))
                weights = Fp8Weights(weight, scales, self.block)
        except ValueError as error:
            raise error if isinstance(error, TensorError) else TensorError(f"{name}.weight: {error}") from error
        return LinearWeights((weights,), (self._rounding(source, name),), read_bias(source, name, shape[0], bias))

    def _rounding(self, source: Source, name: str) -> Rounding:
        if self.is_static:
            stored = present(source, name, INPUT_SCALES) or (f"{name}.{INPUT_SCALES[0]}",)
            return Rounding("e4m3", 8, scale=take_scalar(source, stored[0]))
        channels = None if self.block is None else self.block[1]
        return Rounding("e4m3", 8, channels, scale_grid="e8m0-up" if self.powers_of_two else "float")


def read_config(config: Mapping[str, Any]) -> Fp8:
    """Build the reader from a quantization config. Raises FormatRefused naming the setting that is not supported."""
    settings = read_settings(config, _Settings, INFORMATIONAL, WHERE)
    block = settings.weight_block_size
    if block is not None and min(block) < 1:
        raise FormatRefused(f"{WHERE}: weight_block_size must be two positive numbers, found {list(block)}")
    return Fp8(block, settings.activation_scheme == "static", settings.scale_fmt == POWERS_OF_TWO)
