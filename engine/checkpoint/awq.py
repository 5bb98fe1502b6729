"""AWQ checkpoints in the "gemm" layout, as AutoAWQ, GPTQModel and transformers write them.

    w[n, k] = scales[k // G, n] * (q[k, n] - z[k // G, n])

    qweight  [in, out / 8]       int32, 4-bit codes packed along the outputs
    qzeros   [groups, out / 8]   int32, packed the same way; no offset
    scales   [groups, out]       float16

Eight outputs share a word: bits 4p .. 4p+3 hold output ORDER[p] of the eight. Which layers are quantized is seen in the
files; the tools disagree on how ``modules_to_not_convert`` is matched.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from engine.checkpoint.errors import FormatRefused, TensorError
from engine.checkpoint.linear import is_packed, present, read_bias, read_dense, read_settings, rename
from engine.checkpoint.source import FLOATS, Source
from kernels.linear.affine.layout import AffineWeights
from kernels.linear.weights import LinearWeights

PARTS = ("qweight", "qzeros", "scales", "bias", "weight")
WHERE = "AWQ config"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # field of a word -> output
PER_WORD = 8
SYNONYMS = {"w_bit": "bits", "q_group_size": "group_size", "version": "format", "checkpoint_format": "format"}
INFORMATIONAL = frozenset(
    {
        "act_group_aware",
        "batch_size",
        "block_name_to_quantize",
        "cache_block_outputs",
        "damp_percent",
        "dataset",
        "do_fuse",
        "exllama_config",
        "fuse_max_seq_len",
        "lm_head",
        "max_input_length",
        "meta",
        "method",
        "model_seqlen",
        "module_name_preceding_first_block",
        "modules_in_block_to_quantize",
        "modules_to_fuse",
        "modules_to_not_convert",
        "pad_token_id",
        "quant_method",
        "sym",
        "tokenizer",
        "true_sequential",
    }
)


class _Settings(msgspec.Struct, frozen=True):
    bits: Literal[4] = 4
    group_size: int = 128
    zero_point: bool = True
    format: str = "gemm"
    backend: str | None = None
    pack_dtype: str = "int32"


@dataclass(frozen=True)
class Awq:
    """The reader of AWQ checkpoints."""

    group_size: int  # -1: the whole row
    name: str = "awq"

    def describe(self) -> str:
        return "AWQ 4-bit " + ("per row" if self.group_size == -1 else f"g{self.group_size}")

    def tensor_names(self, source: Source, name: str) -> tuple[str, ...]:
        return present(source, name, PARTS)

    def linear(self, source: Source, name: str, shape: tuple[int, int], bias: bool) -> LinearWeights:
        if not is_packed(source, name, "qweight"):
            return read_dense(source, name, shape, bias)
        out_features, in_features = shape
        if out_features % PER_WORD:
            raise TensorError(f"{name} has {out_features} outputs, but AWQ packs {PER_WORD} into a word")
        group_size = in_features if self.group_size == -1 else min(self.group_size, in_features)
        num_groups = -(-in_features // group_size)
        words = out_features // PER_WORD
        qweight = source.take(f"{name}.qweight", (in_features, words), (torch.int32,))
        qzeros = source.take(f"{name}.qzeros", (num_groups, words), (torch.int32,))
        scales = source.take(f"{name}.scales", (num_groups, out_features), FLOATS)
        weights = AffineWeights(
            bits=4,
            in_features=in_features,
            group_size=group_size,
            codes=_codes(qweight),  # [out, in / 2]
            scales=scales.t().contiguous(),  # [out, groups]
            zeros=_zeros(qzeros),  # [out, groups]
        )
        return LinearWeights((weights,), bias=read_bias(source, name, out_features, bias))


def read_config(config: Mapping[str, Any]) -> Awq:
    """Build the reader from a quantization config. Raises FormatRefused naming the setting that is not supported."""
    settings = read_settings(rename(config, SYNONYMS, WHERE), _Settings, INFORMATIONAL, WHERE)
    layout = "llm-awq" if settings.backend == "llm-awq" else settings.format.lower()
    if layout != "gemm":
        raise FormatRefused(
            f"{WHERE}: version {layout!r} is not supported, only 'gemm' is: quantize or save the model again with "
            "version 'GEMM', AutoAWQ's default"
        )
    if not settings.zero_point or settings.pack_dtype != "int32":
        raise FormatRefused(f"{WHERE}: zero_point false and pack_dtype other than int32 are not the gemm layout")
    if settings.group_size != -1 and settings.group_size < 1:
        raise FormatRefused(f"{WHERE}: group_size must be -1 or positive, found {settings.group_size}")
    return Awq(settings.group_size)


def _codes(qweight: Tensor) -> Tensor:
    """[in, words] int32 -> [out, ceil(in / 2)] uint8: the bytes of two input channels are merged nibble by nibble."""
    rows = torch.nn.functional.pad(qweight.contiguous().view(torch.uint8), (0, 0, 0, qweight.shape[0] % 2))
    even, odd = rows[0::2], rows[1::2]  # [in / 2, 4 * words], two outputs in a byte
    low, high = (even & 0xF) | (odd << 4), (even >> 4) | (odd & 0xF0)  # [in / 2, 4 * words], two inputs in a byte
    return _outputs_first(low, high)


def _zeros(qzeros: Tensor) -> Tensor:
    """[groups, words] int32 -> [out, groups] uint8."""
    packed = qzeros.contiguous().view(torch.uint8)  # [groups, 4 * words]
    return _outputs_first(packed & 0xF, packed >> 4)


def _outputs_first(low: Tensor, high: Tensor) -> Tensor:
    """Fields 0, 2, 4, 6 of every word in `low`, 1, 3, 5, 7 in `high`, [rows, 4 * words] each -> [out, rows]."""
    fields = torch.stack((low, high), dim=-1).view(low.shape[0], -1, PER_WORD)  # [rows, words, 8]
    field_of_output = torch.tensor(ORDER).argsort()
    return fields[..., field_of_output].flatten(1).t().contiguous()
