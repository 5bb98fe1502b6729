"""MXFP4 as gpt-oss stores it (quant_method "mxfp4"), of linear layers; its experts are not served.

w[n, k] = table[code[n, k]] * 2^(scale[n, k // 32] - 127)

weight_blocks  [out, in / 32, 16]  uint8, two e2m1 codes a byte, the first channel low
weight_scales  [out, in / 32]      uint8
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from engine.checkpoint.errors import FormatRefused, TensorError
from engine.checkpoint.linear import read_bias, read_dense, read_settings
from engine.checkpoint.source import Source
from kernels.linear.table.layout import TableWeights
from kernels.linear.table.tables import E2M1
from kernels.linear.weights import LinearWeights

WHERE = "MXFP4 config"
INFORMATIONAL = frozenset({"quant_method", "modules_to_not_convert", "dequantize"})
GROUP = 32
NOT_A_SCALE = 255  # the one exponent of e8m0 that stands for NaN


class _Settings(msgspec.Struct, frozen=True):
    """Nothing can be set."""


@dataclass(frozen=True)
class Mxfp4:
    """The reader of MXFP4 checkpoints."""

    name: str = "mxfp4"

    def describe(self) -> str:
        return "MXFP4"

    def linear(self, source: Source, name: str, shape: tuple[int, int], bias: bool) -> LinearWeights:
        expert = next((key for key in source.names() if ".experts." in key and key.endswith("_blocks")), None)
        if expert is not None:
            raise FormatRefused(
                f"{source.folder}: tensor {expert!r} holds experts, and mixtures of experts are not served"
            )
        if f"{name}.weight_blocks" not in source:
            return read_dense(source, name, shape, bias)
        out_features, in_features = shape
        groups = (out_features, -(-in_features // GROUP))
        blocks = source.take(f"{name}.weight_blocks", (*groups, GROUP // 2), (torch.uint8,))
        exponents = source.take(f"{name}.weight_scales", groups, (torch.uint8,))
        if bool((exponents == NOT_A_SCALE).any()):
            raise TensorError(f"tensor {name + '.weight_scales'!r} holds scales that are NaN")
        codes = blocks.flatten(1)[:, : -(-in_features // 2)].contiguous()
        weights = TableWeights(4, in_features, GROUP, codes, exponents.view(torch.float8_e8m0fnu), E2M1)
        return LinearWeights((weights,), bias=read_bias(source, name, out_features, bias))


def read_config(config: Mapping[str, Any]) -> Mxfp4:
    """Build the reader from a quantization config. Raises FormatRefused naming the setting that is not supported."""
    read_settings(config, _Settings, INFORMATIONAL, WHERE)
    return Mxfp4()
