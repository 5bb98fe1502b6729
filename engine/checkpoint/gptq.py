"""GPTQ checkpoints, as AutoGPTQ, GPTQModel, optimum and transformers write them.

    w[n, k] = scales[g_idx[k], n] * (q[k, n] - z[g_idx[k], n])

    qweight  [in * bits / 32, out]      int32, codes of one output packed along the inputs, lowest bits first
    qzeros   [groups, out * bits / 32]  int32, packed along the outputs; v1 stores z - 1, v2 stores z
    scales   [groups, out]              float16, bfloat16 or float32
    g_idx    [in]                       int32, optional: the group of each input channel (act-order scrambles it)

The definition is GPTQModel's loader. It turns v1 into v2 by adding 1 to every field of a whole word, as its writer
subtracts: a zero point 0 borrows from the next field, and only the carry of the addition gives both back. 3-bit fields
straddle words, so there it works field by field.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from engine.checkpoint.codes import input_order, num_words, reorder_codes, words_to_stream, words_to_zeros
from engine.checkpoint.errors import FormatRefused
from engine.checkpoint.linear import is_packed, present, read_bias, read_dense, read_settings, rename
from engine.checkpoint.source import FLOATS, Source
from kernels.linear.affine.layout import AffineWeights
from kernels.linear.transforms import Permutation
from kernels.linear.weights import LinearWeights

PARTS = ("qweight", "qzeros", "scales", "g_idx", "bias", "weight")
ONE_IN_EVERY_FIELD = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # bits -> word
WHERE = "GPTQ config"
V1, V2 = "gptq", "gptq_v2"
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

Bits = Literal[2, 3, 4, 8]


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
    v1: bool  # qzeros hold z - 1
    act_order: bool
    name: str = "gptq"

    def describe(self) -> str:
        group = "per row" if self.layer.group_size == -1 else f"g{self.layer.group_size}"
        return f"GPTQ {self.layer.bits}-bit {group}" + (" act-order" if self.act_order else "")

    def tensor_names(self, source: Source, name: str) -> tuple[str, ...]:
        return present(source, name, PARTS)

    def linear(self, source: Source, name: str, shape: tuple[int, int], bias: bool) -> LinearWeights:
        if not is_packed(source, name, "qweight"):
            return read_dense(source, name, shape, bias)
        layer = self._layer(name)
        out_features, in_features = shape
        group_size = in_features if layer.group_size == -1 else min(layer.group_size, in_features)
        num_groups = -(-in_features // group_size)
        qweight = source.take(f"{name}.qweight", (num_words(in_features, layer.bits), out_features), (torch.int32,))
        qzeros = source.take(f"{name}.qzeros", (num_groups, num_words(out_features, layer.bits)), (torch.int32,))
        scales = source.take(f"{name}.scales", (num_groups, out_features), FLOATS)
        codes = words_to_stream(qweight.t(), layer.bits, in_features)  # [out, in * bits / 8]
        order = _order(source, f"{name}.g_idx", in_features, group_size)  # [in] or None
        if order is not None:
            codes = reorder_codes(codes, layer.bits, order)
        weights = AffineWeights(
            bits=layer.bits,
            in_features=in_features,
            group_size=group_size,
            codes=codes,
            scales=scales.t().contiguous(),  # [out, groups]
            zeros=self._zeros(qzeros, layer.bits, out_features),  # [out, groups]
        )
        pre = () if order is None else (Permutation(order),)
        return LinearWeights((weights,), pre, read_bias(source, name, out_features, bias))

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

    def _zeros(self, qzeros: Tensor, bits: int, out_features: int) -> Tensor:
        """[groups, words] int32 -> [out, groups] uint8."""
        if not self.v1:
            return words_to_zeros(qzeros, bits, out_features)
        if bits in ONE_IN_EVERY_FIELD:
            return words_to_zeros(qzeros + ONE_IN_EVERY_FIELD[bits], bits, out_features)
        return (words_to_zeros(qzeros, bits, out_features) + 1) & ((1 << bits) - 1)


def read_config(config: Mapping[str, Any]) -> Gptq:
    """Build the reader from a quantization config. Raises FormatRefused naming the setting that is not supported."""
    settings = read_settings(rename(config, SYNONYMS, WHERE), _Settings, INFORMATIONAL, WHERE)
    if settings.format not in (V1, V2):
        raise FormatRefused(
            f"{WHERE}: format {settings.format!r} is laid out for one GPU kernel; supported are {V1!r} and {V2!r}: "
            "save the model again with GPTQModel in one of these"
        )
    if settings.pack_dtype != "int32":
        raise FormatRefused(f"{WHERE}: pack_dtype {settings.pack_dtype!r} is not supported, only 'int32' is")
    _check_group_size(settings.group_size)
    layer = _LayerSettings(settings.bits, settings.group_size)
    rules = tuple(_rule(pattern, changes, layer) for pattern, changes in (settings.dynamic or {}).items())
    return Gptq(layer, rules, v1=settings.format == V1, act_order=settings.desc_act)


def _rule(pattern: str, changes: Mapping[str, Any], layer: _LayerSettings) -> _Rule:
    """One entry of `dynamic`: "-:regex" leaves layers dense, "+:regex" or "regex" changes their bits or group size."""
    where = f"{WHERE}: dynamic {pattern!r}"
    try:
        compiled = re.compile(pattern.removeprefix("-:").removeprefix("+:"))
    except re.error as error:
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


def _order(source: Source, key: str, in_features: int, group_size: int) -> Tensor | None:
    if key not in source:
        return None
    g_idx = source.take(key, (in_features,), (torch.int32, torch.int64))
    return input_order(g_idx, group_size, key)
