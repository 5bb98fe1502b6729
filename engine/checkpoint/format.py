"""Which reader a checkpoint needs. Adding a format means one file beside this one and one line in READERS."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

from engine.checkpoint import (
    aqlm,
    asvd,
    auto_round,
    awq,
    bitnet,
    bitsandbytes,
    compressed_tensors,
    fp8,
    fp_quant,
    gptq,
    hqq,
    modelopt,
    mxfp4,
    nibble,
    quip,
    torchao,
)
from engine.checkpoint.dense import Dense
from engine.checkpoint.errors import FormatRefused
from engine.checkpoint.refused import refuse
from engine.checkpoint.source import Source
from kernels.linear.weights import LinearWeights


class Format(Protocol):
    """The reader of one on-disk format, configured for one checkpoint."""

    @property
    def name(self) -> str:
        """The value of quant_method, or "dense"."""
        ...

    def describe(self) -> str:
        """What the start screen shows: "GPTQ 4-bit g128"."""
        ...

    def linear(self, source: Source, name: str, shape: tuple[int, int], bias: bool) -> LinearWeights:
        """Read the linear layer `name`, "model.layers.0.self_attn.q_proj"; shape is (out_features, in_features).

        Layers the checkpoint left unquantized come back dense. Raises TensorError naming the tensor that is missing
        or of another shape, FormatRefused when config and files contradict each other.
        """
        ...


READERS: Mapping[str, Callable[[Mapping[str, Any]], Format]] = MappingProxyType(
    {
        "aqlm": aqlm.read_config,
        "auto-round": auto_round.read_config,
        "awq": awq.read_config,
        "bitnet": bitnet.read_config,
        "bitsandbytes": bitsandbytes.read_config,
        "compressed-tensors": compressed_tensors.read_config,
        "fp8": fp8.read_config,
        "fp_quant": fp_quant.read_config,
        "gptq": gptq.read_config,
        "hqq": hqq.read_config,
        "modelopt": modelopt.read_config,
        "mxfp4": mxfp4.read_config,
        "nibble": nibble.read_config,
        "torchao": torchao.read_config,
    }
)
# Files in which tools left the config before config.json had a place for it, and the method that they mean.
SIDE_FILES = (("quantize_config.json", "gptq"), ("quant_config.json", "awq"), ("hf_quant_config.json", "modelopt"))
PACKED = (".qweight", ".weight_packed")


def detect(config: Mapping[str, Any], source: Source) -> Format:
    """Choose the reader by `config`, the checkpoint's config.json. Raises FormatRefused naming what is unsupported."""
    found = _quantization_config(config, source)
    if found is None:
        packed = next((name for name in source.names() if name.endswith(PACKED)), None)
        if packed is not None:
            raise FormatRefused(
                f"{source.folder}: tensor {packed!r} is quantized, but config.json has no quantization_config and "
                "there is no quantize_config.json: fetch the missing file"
            )
        if quip.PARAMS in config:
            return quip.read_config(config[quip.PARAMS])
        if asvd.RANKS in config:
            return asvd.read_config(config)
        return hqq.Hqq() if any(name.endswith(f".{hqq.MARK}") for name in source.names()) else Dense()
    method = found.get("quant_method", found.get("method"))
    refuse(method)
    if not isinstance(method, str) or method not in READERS:
        raise FormatRefused(
            f"{source.folder}: quant_method {method!r} is not supported; supported are {', '.join(sorted(READERS))} "
            "and unquantized checkpoints"
        )
    return READERS[method](found)


def _quantization_config(config: Mapping[str, Any], source: Source) -> Mapping[str, Any] | None:
    """From config.json, where compressed-tensors once called it compression_config, or from a file beside it."""
    for field in ("quantization_config", "compression_config"):
        found = config.get(field)
        if isinstance(found, Mapping):
            return found
        if found is not None:
            raise FormatRefused(f"{source.folder}: {field} in config.json must be an object, found {found!r}")
    for file, method in SIDE_FILES:
        beside = source.json(file)
        if beside is not None:
            return {"quant_method": method} | beside
    return None
