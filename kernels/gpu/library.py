"""Products of floats, which cuBLAS does best: torch calls it. What hands its products over has "cublas" in its name.

It answers to "triton" and "triton-fixed" as well: whoever asks for those asks for a GPU's kernels.
"""

import torch
from torch import Tensor

from kernels.contract import LinearSpec

TILE_TOKENS = 16  # of "triton-fixed-cublas"


def name_of(fixed: bool) -> str:
    return "triton-fixed-cublas" if fixed else "triton-cublas"


def refusal(spec: LinearSpec) -> str | None:
    """Why cuBLAS cannot serve a layer, or None."""
    if spec.device.type != "cuda":
        return f"cuBLAS runs on CUDA devices, not on {spec.device.type}"
    if spec.dtype != torch.bfloat16:
        return f"takes bfloat16 activations, not {spec.dtype}"
    return None


def matrix(weight: Tensor) -> Tensor:
    """What `multiply` takes: [N, K] bfloat16. float16 and float32 are rounded once, bfloat16 is not copied.

    Lets cuBLAS add the parts of a sum in float32 only; torch allows bfloat16 unless it is told not to.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return weight.to(torch.bfloat16).contiguous()


def multiply(x: Tensor, weight: Tensor, fixed: bool) -> Tensor:
    """x: [num_tokens, K] bfloat16; weight: [N, K] likewise -> x @ weight^T, [num_tokens, N] bfloat16.

    cuBLAS chooses its order of summation by the shapes it is given. With `fixed` it is given one for any number of
    tokens, so that a row's result is the same to the last bit whatever shares its step.
    """
    if not fixed:
        return torch.nn.functional.linear(x, weight)
    num_tokens = x.shape[0]
    padded = torch.nn.functional.pad(x, (0, 0, 0, -num_tokens % TILE_TOKENS))
    y = padded.new_empty(padded.shape[0], weight.shape[0])
    for start in range(0, num_tokens, TILE_TOKENS):
        tile = slice(start, start + TILE_TOKENS)
        torch.mm(padded[tile], weight.t(), out=y[tile])
    return y[:num_tokens]
