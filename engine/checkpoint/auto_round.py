"""AutoRound checkpoints: integer weights in the layouts of GPTQ and AWQ, with settings for single layers.

    packing_format                                     tensors
    auto_round:auto_gptq, auto_round:auto_gptq:...     GPTQ v1, zero points stored less 1
    auto_round, auto_round:gptqmodel, ...:exllamav2    the same, zero points as they are
    auto_round:auto_awq                                AWQ gemm

``extra_config`` names layers, or holds patterns found anywhere in a layer's name; a layer's own name counts first.
Codes of 2 to 8 bits lie in GPTQ's order: unlike GPTQModel, AutoRound lets those of 5, 6 and 7 bits straddle words.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from engine.checkpoint import gptq_layout
from engine.checkpoint.awq_layout import read_gemm
from engine.checkpoint.errors import FormatRefused
from engine.checkpoint.gptq_layout import GptqLayout
from engine.checkpoint.linear import PATTERN_ERRORS, is_packed, read_dense, read_settings, rename
from engine.checkpoint.source import Source
from kernels.linear.weights import LinearWeights

WHERE = "AutoRound config"
SYNONYMS = {"backend": "packing_format"}  # of releases before 0.4
FIRST, LAST = "auto_round", ("auto_gptq", "gptq", "gptqmodel", "auto_awq", "awq", "exllamav2")
# How the weights were made; which blocks hold quantized layers is seen in the files.
INFORMATIONAL = frozenset(
    {
        "amp",
        "autoround_version",
        "batch_size",
        "block_name_to_quantize",
        "dataset",
        "enable_minmax_tuning",
        "enable_norm_bias_tuning",
        "enable_quanted_input",
        "gradient_accumulate_steps",
        "iters",
        "low_gpu_mem_usage",
        "lr",
        "minmax_lr",
        "modules_in_block_to_quantize",
        "nsamples",
        "quant_block_list",
        "quant_method",
        "scale_dtype",
        "seqlen",
        "sym",
        "to_quant_block_names",
        "train_bs",
    }
)
# Of activations, which stay as they are from 16 bits on.
UNROUNDED = frozenset({"act_data_type", "act_dynamic", "act_group_size", "act_sym"})
DENSE_BITS = 16

Bits = Literal[2, 3, 4, 5, 6, 7, 8, 16, 32]


class _LayerSettings(msgspec.Struct, frozen=True):
    bits: Bits
    group_size: int
    data_type: str = "int"
    act_bits: int = DENSE_BITS


class _Settings(_LayerSettings, frozen=True):
    packing_format: str = FIRST
    extra_config: dict[str, dict[str, Any]] | None = None


@dataclass(frozen=True)
class _Rule:
    """One entry of extra_config."""

    name: str
    pattern: re.Pattern[str] | None  # None: not a regular expression, so only a name
    layer: _LayerSettings


@dataclass(frozen=True)
class AutoRound:
    """The reader of AutoRound checkpoints."""

    layer: _LayerSettings
    rules: tuple[_Rule, ...]
    awq: bool
    minus_one: bool  # qzeros hold z - 1
    name: str = "auto-round"

    def describe(self) -> str:
        group = "per row" if self.layer.group_size == -1 else f"g{self.layer.group_size}"
        return f"AutoRound {self.layer.bits}-bit {group}"

    def linear(self, source: Source, name: str, shape: tuple[int, int], bias: bool) -> LinearWeights:
        if not is_packed(source, name, "qweight"):
            return read_dense(source, name, shape, bias)
        layer = self._layer(name)
        if layer.bits >= DENSE_BITS:
            raise FormatRefused(f"{WHERE}: {name} is stored as qweight, but extra_config gives it {layer.bits} bits")
        if not self.awq:
            layout = GptqLayout(layer.bits, layer.group_size, self.minus_one)
            return gptq_layout.read_layer(source, name, shape, bias, layout)
        if layer.bits != 4:
            raise FormatRefused(f"{WHERE}: {name} has {layer.bits} bits; AWQ packing is supported for 4 only")
        return read_gemm(source, name, shape, bias, layer.group_size)

    def _layer(self, name: str) -> _LayerSettings:
        for rule in self.rules:
            if rule.name == name:
                return rule.layer
        for rule in self.rules:
            if rule.pattern is not None and rule.pattern.search(name):
                return rule.layer
        return self.layer


def read_config(config: Mapping[str, Any]) -> AutoRound:
    """Build the reader from a quantization config. Raises FormatRefused naming the setting that is not supported."""
    settings = read_settings(rename(config, SYNONYMS, WHERE), _Settings, INFORMATIONAL | UNROUNDED, WHERE)
    first, *packing = settings.packing_format.split(":")
    if first != FIRST or not set(packing) <= set(LAST):
        raise FormatRefused(
            f"{WHERE}: packing_format {settings.packing_format!r} is not supported; supported are auto_round, "
            "auto_round:auto_gptq, auto_round:gptqmodel and auto_round:auto_awq"
        )
    layer = _checked(_LayerSettings(settings.bits, settings.group_size, settings.data_type, settings.act_bits), WHERE)
    if layer.bits >= DENSE_BITS:
        raise FormatRefused(f"{WHERE}: bits {layer.bits} is no quantization")
    rules = tuple(_rule(name, changes, layer) for name, changes in (settings.extra_config or {}).items())
    minus_one = bool({"auto_gptq", "gptq"} & set(packing))
    return AutoRound(layer, rules, awq=bool({"auto_awq", "awq"} & set(packing)), minus_one=minus_one)


def _rule(name: str, changes: Mapping[str, Any], layer: _LayerSettings) -> _Rule:
    where = f"{WHERE}: extra_config {name!r}"
    merged = msgspec.structs.asdict(layer) | {key: value for key, value in changes.items() if value is not None}
    settings = _checked(read_settings(merged, _LayerSettings, INFORMATIONAL | UNROUNDED, where), where)
    try:
        return _Rule(name, re.compile(name), settings)
    except PATTERN_ERRORS:
        return _Rule(name, None, settings)


def _checked(layer: _LayerSettings, where: str) -> _LayerSettings:
    """Raises FormatRefused for weights that are not integers, and for activations that are rounded."""
    if layer.data_type not in ("int", "int_sym", "int_asym"):
        raise FormatRefused(f"{where}: data_type {layer.data_type!r} is not supported, only 'int' is")
    if layer.act_bits < DENSE_BITS:
        raise FormatRefused(f"{where}: act_bits {layer.act_bits}, rounded activations, is not supported")
    if layer.group_size != -1 and layer.group_size < 1:
        raise FormatRefused(f"{where}: group_size must be -1 (the whole row) or positive, found {layer.group_size}")
    return layer
