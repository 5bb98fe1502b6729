"""QuIP#: the codebooks and transforms by their definitions, fixtures encoded without the reader, and refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.checkpoint.errors import FormatRefused, TensorError
from engine.checkpoint.hadamards import ORDERS, hadamard_of, matrix_of
from engine.checkpoint.quip import FusedLayer, Quip, read_config
from engine.checkpoint.quip_codes import e8_book, e8p_book
from engine.checkpoint.source import Source
from kernels.linear.codebook.layout import CodebookWeights
from kernels.linear.transforms import Diagonal
from kernels.linear.weights import LinearWeights
from tests.engine.checkpoint.worlds import ALL, DOWN, FIXTURES, QUERY, changed, expected
from tests.tolerance import assert_within

NAMES = [name for name in ALL if name.startswith("quip-")]
ATTENTION, MLP = QUERY.removesuffix(".q_proj"), DOWN.removesuffix(".down_proj")
# Rows of Sloane's matrices: the second one, and of Williamson's the last.
ROWS = {
    12: (1, "++-+---+++-+"),
    20: (1, "++-++----+-+-++++--+"),
    28: (1, "+++-++----++-++-+-++----++-+"),
    36: (1, "++++-+---++---+-+++-++-+---++---+-++"),
    52: (-1, "++++-++-++++--+-++--++-+-----++++++---+-+--++++--+-+"),
    60: (-1, "+-+---+-+-++-++---+----++-----+++++--++++-+++--+--+-+-+++-++"),
    108: (
        1,
        "++-+--++++------+-++-+++-+-+-+--++-----+----+-++---++--++--+++--+-++++-+++++--++-+-+-+---+--+-++++++----++-+",
    ),
    156: (
        -1,
        "+++--+-+-+++++---+--+---+++++-+-+--+++---++--+-+++-+-++-++++-++-+-+++-+--++---"
        "+++---+--++----+-+--+-+----++--+---++++++--+-+-----+--++----++--+-----+-+--+++",
    ),
    172: (
        -1,
        "-+++----+-++-++--++++++++--++-++-+----+++----+-+--++-+-+----+-++++-+----+-+-++--+-+---"
        "+-++++++----+-+--++-++-++--+-+----++++++-++---++--++++-+-+++-++--++-+++-+-++++--++---+",
    ),
}
ROUNDINGS = 64  # of float32 that a weight sees between its code and the matrix: 2 x (25 of a rotation, 7 others)


def reader(name: str) -> tuple[Quip, Source]:
    folder = FIXTURES / name
    return read_config(json.loads((folder / "config.json").read_text())["quip_params"]), Source(folder)


def fused(form: Quip, source: Source, layers: list[str], num_rows: int = 64) -> FusedLayer:
    layer = form.fused(source, [(name, (num_rows, 64)) for name in layers], bias=False)
    assert layer is not None
    return layer


def test_e8p_is_a_part_of_the_lattice_shifted_by_a_quarter() -> None:
    """Bug: a table entry mistyped, a sign of the wrong channel, two codes for one vector."""
    book = e8p_book().float()  # [65536, 8]
    shift = 0.25 - 0.5 * torch.tensor([code.bit_count() % 2 for code in range(256)]).repeat(256)
    points = book - shift[:, None]  # halves of odd numbers, of even sum
    assert bool(((2 * points) % 2 == 1).all())
    assert bool((points.sum(1) % 2 == 0).all())
    assert len(torch.unique(book, dim=0)) == 1 << 16
    norms = points[::256].square().sum(1)
    assert [int((norms <= 10).sum()), int((norms == 12).sum())] == [227, 29]
    assert torch.equal(points.abs().view(256, 256, 8), points.abs().view(256, 256, 8)[:, :1].expand(-1, 256, -1))


def test_e8_of_one_bit_holds_the_shortest_vectors() -> None:
    norms = e8_book().float().square().sum(1)
    assert [int((norms == norm).sum()) for norm in (0, 2, 4)] == [1, 240, 15]
    assert len(torch.unique(e8_book(), dim=0)) == 256


@pytest.mark.parametrize("order", ORDERS)
def test_hadamard_matrices_are_orthogonal_and_those_of_the_table(order: int) -> None:
    """Bug: a Hadamard matrix, but not the one that the weights were multiplied by."""
    matrix = matrix_of(order)
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order))
    if order in ROWS:
        row, signs = ROWS[order]
        assert "".join("+" if value > 0 else "-" for value in matrix[row].tolist()) == signs


@pytest.mark.parametrize("width", [64, 48, 344])
def test_transforms_are_the_matrix_and_its_transpose(width: int) -> None:
    """Bug: channels of a run and runs of a channel exchanged, the transpose on the wrong side."""
    order = next((order for order in ORDERS if width % order == 0), 1)
    dense = matrix_of(order).double() if order > 1 else torch.ones(1, 1, dtype=torch.float64)
    while len(dense) < width:
        dense = torch.kron(dense, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    dense = dense / width**0.5
    for transposed, wanted in ((False, dense), (True, dense.T)):
        rows = torch.eye(width)
        for transform in hadamard_of(width, transposed):
            rows = transform.apply(rows)
        # Each entry is a product with one channel: exact sums of zeros, and at most 4 roundings of it.
        assert_within(rows.T, wanted, 2**-22 * wanted.abs(), "transform")


def allowed(weights: LinearWeights) -> Tensor:
    """How far float32 may be from the exact matrix, [out, in]: entries of a transform are all of one size, so that an
    element is a sum of every stored value over the root of their number."""
    first, last = weights.pre[0], weights.post[-1]
    assert isinstance(first, Diagonal)
    assert isinstance(last, Diagonal)
    inner = torch.stack([term.dequantize() for term in weights.terms]).abs().sum(0).double()
    mean = inner.sum() / inner.numel() ** 0.5
    bound: Tensor = ROUNDINGS * 2**-24 * mean * last.scale.double().abs()[:, None] * first.scale.double().abs()
    return bound


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_the_definition(name: str) -> None:
    """Bug: codes unpacked in another order, up taken for gate, a scale of the wrong part, the residual left out."""
    form, source = reader(name)
    dense = expected(FIXTURES / name)
    qkv = fused(form, source, [f"{ATTENTION}.{part}_proj" for part in "qkv"])
    upgate = fused(form, source, [f"{MLP}.gate_proj", f"{MLP}.up_proj"], num_rows=192)
    asked = ([f"{ATTENTION}.{part}_proj" for part in "qkv"], [f"{MLP}.gate_proj", f"{MLP}.up_proj"])
    for layer, parts in zip((qkv, upgate), asked, strict=True):
        weight, bound = layer.weights.dequantize(), allowed(layer.weights)
        for part, rows in zip(parts, layer.outputs, strict=True):
            assert_within(weight[rows], dense[part], bound[rows], part)
            shape = (dense[part].shape[0], 64)
            assert torch.equal(form.linear(source, part, shape, False).dequantize(), weight[rows])
    for part in (f"{ATTENTION}.o_proj", DOWN):
        alone = form.linear(source, part, (dense[part].shape[0], dense[part].shape[1]), False)
        assert_within(alone.dequantize(), dense[part], allowed(alone), part)


def test_a_residual_scale_may_be_given() -> None:
    form = read_config(parameters(codebook="E8P12RVQ4B", codebook_version=1, resid_scale_override=4.0))
    layer = form.linear(Source(FIXTURES / "quip-e8p12rvq4b"), DOWN, (64, 192), False)
    residual = layer.terms[1]
    assert isinstance(residual, CodebookWeights)
    assert set(residual.scales.flatten().tolist()) == {0.25}


def parameters(**changes: Any) -> dict[str, Any]:
    return {"codebook": "E8P12", "codebook_version": 1, "lora_rank": 0, "rescale_WH": False} | changes


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"codebook": "D4"}, "codebook"),
        ({"codebook_version": 0}, "codebook_version 0 of E8P12"),
        ({"lora_rank": 64}, "lora_rank = 64"),
        ({"rescale_WH": True}, "rescale_WH"),
        ({"outlier_channel_split": True}, "outlier_channel_split"),
        ({"pack_out": True}, "pack_out"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatRefused, match=message):
        read_config(parameters(**setting))


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        (f"{DOWN}.codebook_id", torch.tensor(17), "codebook_id' is 17, expected 7"),
        (f"{DOWN}.SU", torch.full((192,), torch.nan).half(), "SU' holds scales that are not finite"),
        (f"{ATTENTION}.qkv_proj.SV", torch.ones(63).half(), "qkv_proj has 63 rows, which are not those of"),
    ],
)
def test_damaged_layers_are_named(tensor: str, value: Tensor, message: str, tmp_path: Path) -> None:
    """Bug: a layer of another codebook read as noise."""
    source = Source(changed("quip-e8p12", tmp_path, {tensor: value}))
    name, width = (DOWN, 192) if tensor.startswith(DOWN) else (QUERY, 64)
    with pytest.raises(TensorError, match=message):
        read_config(parameters()).linear(source, name, (64, width), False)


def test_sizes_without_tiles_or_transforms_are_refused() -> None:
    form, source = reader("quip-e8p12")
    with pytest.raises(TensorError, match="not whole tiles"):
        form.linear(source, DOWN, (64, 190), False)
    with pytest.raises(ValueError, match="704 channels are not a power of two times"):
        hadamard_of(704)
