"""AWQ checkpoints in the layouts "gemm", "gemv" and "gemv_fast", as AutoAWQ, GPTQModel and transformers write them.

    w[n, k] = scales[k // G, n] * (q[k, n] - z[k // G, n])

awq_layout.py reads the tensors. Which layers are quantized is seen in the files; the tools disagree on how
``modules_to_not_convert`` is matched.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import msgspec

from engine.checkpoint.awq_layout import read_gemm, read_gemv, read_gemv_fast
from engine.checkpoint.errors import FormatRefused
from engine.checkpoint.linear import is_packed, read_dense, read_settings, rename
from engine.checkpoint.source import Source
from kernels.linear.weights import LinearWeights

WHERE = "AWQ config"
LAYOUTS = MappingProxyType({"gemm": read_gemm, "gemv": read_gemv, "gemv_fast": read_gemv_fast})
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
    layout: str = "gemm"
    name: str = "awq"

    def describe(self) -> str:
        return "AWQ 4-bit " + ("per row" if self.group_size == -1 else f"g{self.group_size}")

    def linear(self, source: Source, name: str, shape: tuple[int, int], bias: bool) -> LinearWeights:
        if not is_packed(source, name, "qweight"):
            return read_dense(source, name, shape, bias)
        return LAYOUTS[self.layout](source, name, shape, bias, self.group_size)


def read_config(config: Mapping[str, Any]) -> Awq:
    """Build the reader from a quantization config. Raises FormatRefused naming the setting that is not supported."""
    settings = read_settings(rename(config, SYNONYMS, WHERE), _Settings, INFORMATIONAL, WHERE)
    layout = "llm-awq" if settings.backend == "llm-awq" else settings.format.lower()
    if layout not in LAYOUTS:
        raise FormatRefused(
            f"{WHERE}: version {layout!r} is not supported, only {', '.join(map(repr, LAYOUTS))} are: quantize or save "
            "the model again with version 'GEMM', AutoAWQ's default"
        )
    if not settings.zero_point or settings.pack_dtype != "int32":
        raise FormatRefused(f"{WHERE}: zero_point false and pack_dtype other than int32 are none of AWQ's layouts")
    if settings.group_size != -1 and settings.group_size < 1:
        raise FormatRefused(f"{WHERE}: group_size must be -1 or positive, found {settings.group_size}")
    return Awq(settings.group_size, layout)
