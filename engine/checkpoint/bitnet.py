"""BitNet b1.58 checkpoints as transformers saves them ("offline": the ternary weights themselves).

    w[n, k] = t[n, k] / weight_scale    linear_class "bitlinear"
    w[n, k] = t[n, k] * weight_scale    linear_class "autobitlinear"

    weight         [out / 4, in]   uint8, bits 2 j of row i hold t + 1 of output i + j out / 4
    weight_scale   [1]

The tools round activations to 8 bits, one scale a token; ours does so too, one scale for at most 160 channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from engine.checkpoint.errors import FormatRefused, TensorError
from engine.checkpoint.linear import read_bias, read_dense, read_settings
from engine.checkpoint.source import FLOATS, Source
from kernels.linear.bitstream import pack_codes
from kernels.linear.table.layout import TableWeights
from kernels.linear.table.tables import TERNARY
from kernels.linear.weights import LinearWeights

WHERE = "BitNet config"
INFORMATIONAL = frozenset({"quant_method", "modules_to_not_convert", "rms_norm_eps"})
PER_BYTE = 4
BITS = 2


class _Settings(msgspec.Struct, frozen=True):
    linear_class: Literal["bitlinear", "autobitlinear"] = "bitlinear"
    quantization_mode: Literal["offline", "online"] = "offline"
    use_rms_norm: bool = False


@dataclass(frozen=True)
class BitNet:
    """The reader of BitNet checkpoints."""

    divides: bool  # by weight_scale; multiplies otherwise
    name: str = "bitnet"

    def describe(self) -> str:
        return "BitNet ternary"

    def linear(self, source: Source, name: str, shape: tuple[int, int], bias: bool) -> LinearWeights:
        out_features, in_features = shape
        if f"{name}.weight_scale" not in source:
            return read_dense(source, name, shape, bias)
        num_rows = -(-out_features // PER_BYTE)
        packed = source.take(f"{name}.weight", (num_rows, in_features), (torch.uint8,))
        scale = source.take(f"{name}.weight_scale", (1,), FLOATS).float()
        if not bool(scale.isfinite().all() and (scale != 0).all()):
            raise TensorError(f"tensor {name + '.weight_scale'!r} is {float(scale)}, which scales nothing")
        weights = TableWeights(
            bits=BITS,
            in_features=in_features,
            group_size=in_features,
            codes=_codes(packed, out_features, name),  # [out, in / 4]
            scales=(1 / scale if self.divides else scale).expand(out_features, 1).contiguous(),
            table=TERNARY,
        )
        return LinearWeights((weights,), bias=read_bias(source, name, out_features, bias))


def read_config(config: Mapping[str, Any]) -> BitNet:
    """Build the reader from a quantization config. Raises FormatRefused naming the setting that is not supported."""
    settings = read_settings(config, _Settings, INFORMATIONAL, WHERE)
    if settings.quantization_mode == "online":
        raise FormatRefused(
            f"{WHERE}: quantization_mode 'online' stores the training weights, not the ternary ones: convert the "
            "checkpoint with transformers to quantization_mode 'offline'"
        )
    if settings.use_rms_norm:
        raise FormatRefused(f"{WHERE}: use_rms_norm, a norm inside every linear layer, is not supported")
    return BitNet(divides=settings.linear_class == "bitlinear")


def _codes(packed: Tensor, out_features: int, name: str) -> Tensor:
    """[out / 4, in] with four outputs in a byte -> [out, ceil(in / 4)] with four inputs in a byte."""
    quarters = [pack_codes((packed >> (BITS * j)) & 3, BITS) for j in range(PER_BYTE)]
    codes = torch.cat(quarters)[:out_features]
    if bool((codes & (codes >> 1) & 0x55).any()):
        raise TensorError(f"tensor {name + '.weight'!r} holds the code 3, which no ternary weight has")
    return codes
