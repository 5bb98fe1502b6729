"""GPTQ checkpoints, as AutoGPTQ, GPTQModel, optimum and transformers write them.

    w[n, k] = scales[g_idx[k], n] * (q[k, n] - z[g_idx[k], n])

    qweight  [in * bits / 32, out]      int32, codes of one output packed along the inputs, lowest bits first
    qzeros   [groups, out * bits / 32]  int32, packed along the outputs; v1 stores z - 1, v2 stores z
    scales   [groups, out]              float16, bfloat16 or float32
    g_idx    [in]                       int32, optional: the group of each input channel (act-order scrambles it)

The definition is GPTQModel's loader. It turns v1 into v2 by adding 1 to every field of a whole word, as its writer
subtracts: a zero point 0 borrows from the next field, and only the carry of the addition gives both back. 3-bit fields
straddle words, so there it works field by field. gptq_layout.py reads the tensors.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from engine.checkpoint import gptq_layout
from engine.checkpoint.errors import FormatRefused
from engine.checkpoint.gptq_layout import GptqLayout
from engine.checkpoint.linear import PATTERN_ERRORS, is_packed, read_dense, read_settings, rename
from engine.checkpoint.source import Source
from kernels.linear.weights import LinearWeights

WHERE = "GPTQ config"
V1, V2, PLANAR = "gptq", "gptq_v2", "gptq_p"  # planar: GPTQModel's layout of 3, 5, 6 and 7 bits, with v2's zero points
SYNONYMS = {"checkpoint_format": "format", "w_bit": "bits", "q_group_size": "group_size"}
# How the weights were made or are best run, not what they mean.
INFORMATIONAL = frozenset(
    {
        "act_group_aware",
        "backend",
        "batch_size",
        "block_name_to_quantize",
        "cache_block_outputs",
        "damp_auto_increment",
        "damp_percent",
        "dataset",
        "disable_exllama",
        "exllama_config",
        "lm_head",
        "max_input_length",
        "meta",
        "method",
        "model_file_base_name",
        "model_name_or_path",
        "model_seqlen",
        "module_name_preceding_first_block",
        "modules_in_block_to_quantize",
        "mse",
        "pad_token_id",
        "parallel_packing",
        "quant_method",
        "static_groups",
        "tokenizer",
        "true_sequential",
        "uri",
        "use_cuda_fp16",
        "use_exllama",
    }
)
INFORMATIONAL_FOR_A_LAYER = INFORMATIONAL | {"desc_act", "sym"}

Bits = Literal[2, 3, 4, 5, 6, 7, 8]
ONLY_PLANAR = (5, 6, 7)


class _Settings(msgspec.Struct, frozen=True):
    bits: Bits
    group_size: int
    desc_act: bool = False  # honoured by g_idx, which says it exactly
    sym: bool = True  # honoured by qzeros, likewise
    format: str = V1
    pack_dtype: str = "int32"
    dynamic: dict[str, dict[str, Any]] | None = None


class _LayerSettings(msgspec.Struct, frozen=True):
    bits: Bits
    group_size: int


@dataclass(frozen=True)
class _Rule:
    """One entry of `dynamic`: layers whose name the pattern matches from its start on."""

    pattern: re.Pattern[str]
    layer: _LayerSettings | None  # None: left dense


@dataclass(frozen=True)
class Gptq:
    """The reader of GPTQ checkpoints."""

    layer: _LayerSettings
    rules: tuple[_Rule, ...]  # the first that matches decides, else `layer`
    format: str
    act_order: bool
    name: str = "gptq"

    def describe(self) -> str:
        group = "per row" if self.layer.group_size == -1 else f"g{self.layer.group_size}"
        return f"GPTQ {self.layer.bits}-bit {group}" + (" act-order" if self.act_order else "")

    def linear(self, source: Source, name: str, shape: tuple[int, int], bias: bool) -> LinearWeights:
        if not is_packed(source, name, "qweight"):
            return read_dense(source, name, shape, bias)
        layer = self._layer(name)
        layout = GptqLayout(layer.bits, layer.group_size, self.format == V1, self.format == PLANAR)
        return gptq_layout.read_layer(source, name, shape, bias, layout)

    def _layer(self, name: str) -> _LayerSettings:
        rule = next((rule for rule in self.rules if rule.pattern.match(name)), None)
        if rule is None:
            return self.layer
        if rule.layer is None:
            raise FormatRefused(
                f"the checkpoint holds {name}.qweight, but `dynamic` in its quantization config says that layer is not "
                f"quantized ({rule.pattern.pattern!r})"
            )
        return rule.layer


def read_config(config: Mapping[str, Any]) -> Gptq:
    """Build the reader from a quantization config. Raises FormatRefused naming the setting that is not supported."""
    settings = read_settings(rename(config, SYNONYMS, WHERE), _Settings, INFORMATIONAL, WHERE)
    if settings.format not in (V1, V2, PLANAR):
        raise FormatRefused(
            f"{WHERE}: format {settings.format!r} is laid out for one GPU kernel; supported are {V1!r}, {V2!r} and "
            f"{PLANAR!r}: save the model again with GPTQModel in one of these"
        )
    if settings.pack_dtype != "int32":
        raise FormatRefused(f"{WHERE}: pack_dtype {settings.pack_dtype!r} is not supported, only 'int32' is")
    _check_group_size(settings.group_size)
    layer = _LayerSettings(settings.bits, settings.group_size)
    rules = tuple(_rule(pattern, changes, layer) for pattern, changes in (settings.dynamic or {}).items())
    for used in (layer, *(rule.layer for rule in rules if rule.layer is not None)):
        if used.bits in ONLY_PLANAR and settings.format != PLANAR:
            raise FormatRefused(
                f"{WHERE}: {used.bits} bits are defined in the format {PLANAR!r} only, found {settings.format!r}"
            )
    return Gptq(layer, rules, settings.format, act_order=settings.desc_act)


def _rule(pattern: str, changes: Mapping[str, Any], layer: _LayerSettings) -> _Rule:
    """One entry of `dynamic`: "-:regex" leaves layers dense, "+:regex" or "regex" changes their bits or group size."""
    where = f"{WHERE}: dynamic {pattern!r}"
    try:
        compiled = re.compile(pattern.removeprefix("-:").removeprefix("+:"))
    except PATTERN_ERRORS as error:
        raise FormatRefused(f"{where} is not a regular expression: {error}") from error
    if pattern.startswith("-:"):
        return _Rule(compiled, None)
    merged = {"bits": layer.bits, "group_size": layer.group_size} | dict(changes)
    changed = read_settings(merged, _LayerSettings, INFORMATIONAL_FOR_A_LAYER, where)
    _check_group_size(changed.group_size)
    return _Rule(compiled, changed)


def _check_group_size(group_size: int) -> None:
    if group_size != -1 and group_size < 1:
        raise FormatRefused(f"{WHERE}: group_size must be -1 (the whole row) or positive, found {group_size}")
