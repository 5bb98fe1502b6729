"""Formats that are recognized and not read, and what to do instead: by quant_method, or by a setting of theirs."""

from collections.abc import Mapping
from types import MappingProxyType

from engine.checkpoint.errors import FormatRefused

REQUANTIZE = "fetch the model in another format, or quantize the original again"
ANOTHER_SERVER = (
    "its layout belongs to one library's GPU kernels: use that library, or fetch the model in another format"
)
TRELLIS = "its codes are decoded by a trellis, for which there is no kernel here: " + REQUANTIZE
CODEBOOK = "its vectors of additive codebooks have no reader here: " + REQUANTIZE

METHODS: Mapping[str, str] = MappingProxyType(
    {
        "eetq": "its int8 weights are ordered for one GPU kernel: "
        + REQUANTIZE
        + ", with bitsandbytes int8 for example",
        "exl2": "its rows have different widths, in ExLlamaV2's own layout: " + REQUANTIZE,
        "exl3": TRELLIS,
        "fbgemm_fp8": "fetch the model as compressed-tensors float-quantized or with quant_method fp8",
        "fouroversix": "its adaptively scaled NVFP4 weights have no reader here: " + REQUANTIZE,
        "gemma": "its rotated weights have no reader here: " + REQUANTIZE,
        "gguf": "GGUF files have no quantization_config: point to the .gguf file",
        "higgs": CODEBOOK,
        "marlin": ANOTHER_SERVER,
        "metal": ANOTHER_SERVER,
        "mxfp8": "fetch the model as compressed-tensors, whose MXFP8 is read",
        "nvfp4": "fetch the model as compressed-tensors or ModelOpt, whose NVFP4 is read",
        "paroquant": "its rotations by pairs have no reader here: " + REQUANTIZE,
        "qqq": ANOTHER_SERVER,
        "qtip": TRELLIS,
        "quanto": "its files are state of optimum-quanto's own tensors: " + REQUANTIZE,
        "quark": "fetch the model as AWQ, GPTQ or compressed-tensors, which AMD Quark can export as well",
        "sinq": "its dual scales have no reader here: " + REQUANTIZE,
        "spqr": "its sparse outliers lie in the order of one GPU kernel: " + REQUANTIZE,
        "squeezellm": "its tables for every row and sparse outliers come as a pickle: " + REQUANTIZE,
        "vptq": "its vector codebooks with residuals have no reader here: " + REQUANTIZE,
    }
)


def refuse(method: object) -> None:
    """Raise FormatRefused, with what to do, when `method` names a format not read."""
    if isinstance(method, str) and method.lower() in METHODS:
        raise FormatRefused(f"{method} checkpoints are not supported; {METHODS[method.lower()]}")
