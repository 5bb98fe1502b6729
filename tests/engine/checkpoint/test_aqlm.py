"""AQLM: tensors packed here from the format's definition, and configs that are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.checkpoint.aqlm import read_config
from engine.checkpoint.errors import FormatRefused, TensorError
from engine.checkpoint.format import detect
from engine.checkpoint.source import Source

NAME = "model.layers.0.mlp.down_proj"
CONFIG = {
    "quant_method": "aqlm",
    "in_group_size": 8,
    "out_group_size": 1,
    "num_codebooks": 2,
    "nbits_per_codebook": 8,
    "linear_weights_not_to_quantize": ["lm_head.weight"],
}
OUT, IN = 12, 64


def pack(codes: Tensor, bits: int) -> Tensor:
    """As the aqlm library stores codes: those of the upper half negative, in the smallest integer that holds them."""
    signed = torch.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes)
    return signed.to(torch.int8 if bits <= 8 else torch.int16)


def write(folder: Path, num_books: int, bits: int, size: int, **others: Tensor) -> tuple[Source, Tensor]:
    """A checkpoint of one layer, and its weights, vector by vector in float64."""
    random = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (OUT, IN // size, num_books), generator=random)
    codes[0, 0], codes[0, 1] = 2**bits - 1, 2 ** (bits - 1)  # the ends of the negative half
    books = torch.randn(num_books, 2**bits, 1, size, generator=random).half()
    scales = (torch.rand(OUT, 1, 1, 1, generator=random) + 0.5).half()
    tensors = {f"{NAME}.codes": pack(codes, bits), f"{NAME}.codebooks": books, f"{NAME}.scales": scales}
    save_file(tensors | others, folder / "model.safetensors")
    expected = torch.zeros(OUT, IN, dtype=torch.float64)
    for n in range(OUT):
        for g in range(IN // size):
            vectors = [books[c, int(codes[n, g, c]), 0].double() for c in range(num_books)]
            expected[n, g * size : (g + 1) * size] = torch.stack(vectors).sum(0) * float(scales[n])
    return Source(folder), expected


@pytest.mark.parametrize(("num_books", "bits", "size"), [(1, 16, 8), (2, 8, 8), (1, 12, 4), (8, 5, 8)])
def test_weights_are_the_sum_of_the_vectors(num_books: int, bits: int, size: int, tmp_path: Path) -> None:
    """Bug: negative codes read from the wrong end, the codebooks of two layers of codes swapped, one scale per term."""
    source, expected = write(tmp_path, num_books, bits, size)
    settings = {"num_codebooks": num_books, "nbits_per_codebook": bits, "in_group_size": size}
    reader = detect({"quantization_config": CONFIG | settings}, source)
    read = reader.linear(source, NAME, (OUT, IN), bias=False)
    assert [term.family for term in read.terms] == ["codebook"] * num_books
    assert torch.allclose(read.dequantize().double(), expected, rtol=1e-6, atol=1e-6)
    assert reader.describe() == f"AQLM {num_books}x{bits} g{size}"
    source.check_all_read()


def test_layers_left_in_16_bits_come_back_dense(tmp_path: Path) -> None:
    head = torch.randn(8, 16).half()
    source, _ = write(tmp_path, 2, 8, 8, **{"lm_head.weight": head})
    assert torch.equal(read_config(CONFIG).linear(source, "lm_head", (8, 16), False).dequantize(), head.float())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"out_group_size": 2}, "out_group_size 2"),
        ({"in_group_size": 16}, "in_group_size"),
        ({"nbits_per_codebook": 17}, "17 bits"),
        ({"num_codebooks": 0}, "0 codebooks"),
        ({"residual": True}, "residual"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatRefused, match=message):
        read_config(CONFIG | setting)


def test_damaged_tensors_are_named(tmp_path: Path) -> None:
    source, _ = write(tmp_path, 2, 8, 8, **{f"{NAME}.scales": torch.full((OUT, 1, 1, 1), torch.nan).half()})
    with pytest.raises(TensorError, match=f"scales of '{NAME}' hold a value that is not finite"):
        read_config(CONFIG).linear(source, NAME, (OUT, IN), False)
    with pytest.raises(TensorError, match=r"codes' has shape \[12, 8, 2\], expected \[12, 9, 2\]"):
        read_config(CONFIG).linear(source, NAME, (OUT, 72), False)
