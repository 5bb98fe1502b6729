"""FP-Quant: what the fixtures of the tool do not show, namely matrices in bfloat16, padded scales and refusals."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.checkpoint.errors import FormatRefused, TensorError
from engine.checkpoint.fp_quant import MATRIX, read_config
from engine.checkpoint.source import Source
from kernels.linear.rounding import Rounding
from kernels.linear.transforms import BlockRotation, Diagonal, Hadamard
from tests.engine.checkpoint.worlds import QUERY, changed, quantization_config, stored
from tests.tolerance import assert_within

MX, NV = "fp-quant-mxfp4", "fp-quant-nvfp4"


def sylvester(size: int) -> Tensor:
    """[size, size] float64, orthonormal, entry by entry."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.tensor(signs, dtype=torch.float64) / math.sqrt(size)


@pytest.mark.parametrize(
    ("matrix", "kinds"),
    [
        (sylvester(32).bfloat16(), [Hadamard, Diagonal]),  # 1 / sqrt(32) is no number of bfloat16
        (sylvester(64).bfloat16(), [Hadamard]),
        (sylvester(32)[:, torch.arange(32).flip(0)].bfloat16(), [BlockRotation]),  # not symmetric: its columns turned
        (torch.eye(32).bfloat16(), []),
    ],
)
def test_inputs_are_multiplied_by_the_stored_matrix(matrix: Tensor, kinds: list[type], tmp_path: Path) -> None:
    """Bug: the transpose of a matrix that is not symmetric; an orthonormal one in place of what bfloat16 made of it."""
    source = Source(changed(MX, tmp_path, {f"{QUERY}.{MATRIX}": matrix}))
    *pre, rounding = read_config(quantization_config(MX)).linear(source, QUERY, (128, 128), False).pre
    assert [type(transform) for transform in pre] == kinds
    assert isinstance(rounding, Rounding)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    y, size = x, matrix.shape[0]
    for transform in pre:
        y = transform.apply(y)
    exact = (x.double().view(5, -1, size) @ matrix.double()).view(5, 128)
    # A sum of `size` products in float32, and a scale or two.
    terms = (x.double().abs().view(5, -1, size) @ matrix.double().abs()).view(5, 128)
    assert_within(y, exact, (size + 4) * 2**-24 * terms, "x M")


@pytest.mark.parametrize("method", ["abs_max", "quest"])
def test_activations_are_rounded_to_powers_of_two(method: str, tmp_path: Path) -> None:
    """Bug: the third of abs_max left out, a deviation about zero in place of the mean, a power of two from above."""
    config = quantization_config(MX) | {"forward_method": method}
    rounding = read_config(config).linear(Source(changed(MX, tmp_path, {})), QUERY, (128, 128), False).pre[-1]
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2)) + 0.7
    x[0, :32] = 0
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    for row, rounded in zip(x.double().view(-1, 32), rounding.apply(x).view(-1, 32), strict=True):
        size = float(row.abs().max()) if method == "abs_max" else float(row.std(correction=0)) * 2.92247856 / 6
        scale = 2.0 ** math.floor(math.log2(size + 1e-8)) / (3 if method == "abs_max" else 1)
        nearest = values[((row.abs() / scale).unsqueeze(1) - values).abs().argmin(1)] * row.sign() * scale
        assert torch.allclose(rounded.double(), nearest, rtol=2**-22, atol=0)


def test_scales_of_padded_rows_are_left_and_padded_columns_refused(tmp_path: Path) -> None:
    """The tool's kernels pad both, and do not say how scales lie in a row that is padded."""
    scales = stored(NV, f"{QUERY}.scales")
    assert scales.shape == (128, 4)  # of 64 outputs
    form = read_config(quantization_config(NV))
    read = form.linear(Source(changed(NV, tmp_path, {f"{QUERY}.scales": scales[:64]})), QUERY, (64, 64), False)
    assert read.terms[0].out_features == 64
    wide = torch.nn.functional.pad(scales, (0, 4))
    with pytest.raises(TensorError, match="scales of rows that are padded"):
        form.linear(Source(changed(NV, tmp_path, {f"{QUERY}.scales": wide})), QUERY, (64, 64), False)


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("scales", torch.full((128, 4), 255, dtype=torch.uint8), "scales that are NaN"),
        ("weight_global_scale", torch.zeros(1), "expected a positive scale"),
        (MATRIX, torch.zeros(3, 3), "expected square blocks of 128 channels"),
        ("weight", torch.zeros(128, 128), "weight' has shape"),
    ],
)
def test_damaged_layers_are_named(tensor: str, value: Tensor, message: str, tmp_path: Path) -> None:
    """Bug: master weights beside codes, of which one would be ignored."""
    source = Source(changed(MX, tmp_path, {f"{QUERY}.{tensor}": value}))
    with pytest.raises(TensorError, match=message):
        read_config(quantization_config(MX)).linear(source, QUERY, (128, 128), False)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"forward_dtype": "mxfp8"}, "forward_dtype"),
        ({"forward_dtype": "nvfp4", "forward_method": "quest"}, "'quest' is for mxfp4 only"),
        ({"store_master_weights": True}, "finalize_master_weights"),
        ({"activation_dtype": "fp8"}, "activation_dtype"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatRefused, match=message):
        read_config(quantization_config(MX) | setting)
