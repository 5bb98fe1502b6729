"""Every Triton kernel against its reference, under Triton's interpreter. test_gpu.py runs this file in a process of its
own with TRITON_INTERPRET=1, which must be set before triton is imported.

The interpreter computes with numpy, element by element: shapes are tiny and odd.
"""

import importlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.checkpoint.gguf_blocks import IQ4
from kernels.activation.gpu import ActivationTriton
from kernels.gpu.configs import default_configs, grid_for
from kernels.gpu.multiply import constants, multiply
from kernels.gpu.packing import LINEAR, LOOKUP, Packed
from kernels.linear.affine.gpu import AffineTriton
from kernels.linear.affine.layout import AffineWeights
from kernels.linear.table.gpu import TableTriton
from kernels.linear.table.layout import TableWeights
from kernels.linear.table.tables import BINARY, E2M1, NF4, TERNARY
from kernels.norm.gpu import NormTriton
from kernels.rope.gpu import RopeTriton
from tests.kernels.weights import random_affine, random_minima, random_nested, random_table
from tests.tolerance import EPS, assert_within, dot_bound

EPS_BF16 = torch.finfo(torch.bfloat16).eps
NUM_TOKENS = [3, 10, 17, 130]  # each of the table's entries; of the last, two tiles of tokens
N = 19  # not a whole tile of rows


@pytest.fixture(autouse=True)
def _products_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bfloat16 as 16-bit integers, and its tl.dot multiplies those: Triton 3.9."""
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")

    def dot(_: Any, a: Any, b: Any, d: Any, *__: Any) -> Any:
        assert a.data.dtype == b.data.dtype == np.uint16
        wide = [(operand.data.astype(np.uint32) << 16).view(np.float32) for operand in (a, b)]
        return interpreter.TensorHandle(np.matmul(*wide) + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def product(x: Tensor, packed: Packed) -> Tensor:
    """The kernels' sums before they are rounded to bfloat16."""
    y = torch.full((x.shape[0], packed.out_features), torch.nan)
    multiply(x, packed, y)
    return y


def activations(num_tokens: int, width: int) -> Tensor:
    return torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(7)).bfloat16()


def check(packed: Packed, weights: AffineWeights | TableWeights, num_tokens: int) -> None:
    """The sum is taken in two parts, codes less `base` and what that leaves; each has the bound of its own."""
    x = activations(num_tokens, packed.in_features)
    exact, matrix = x.double(), weights.dequantize().double()
    shift, size = shift_of(packed), exact.abs() @ matrix.abs().T
    bound = dot_bound(exact, matrix - shift) + dot_bound(exact, shift) + 2 * EPS * (exact.abs() @ shift.abs().T)
    if packed.meaning == LOOKUP:  # the table's entries are rounded
        bound += EPS_BF16 / 2 * size
    if grid_for(num_tokens, packed.out_features, packed.num_blocks).config.kernel == "many":
        bound += ROUNDINGS[rounding_of(packed)] * size
    bound += EPS * size  # scales of tables are multiplied by the factor one by one there
    assert_within(product(x, packed), exact @ matrix.T, bound, weights.describe())


def rounding_of(packed: Packed) -> str:
    """What "many" does to a weight before it is multiplied."""
    if packed.exact_scales:
        return "exact"
    return "in float32" if constants(packed, default_configs().entries[-1])["SHIFT"] > 2 else "in parts"


# Of a weight. The interpreter cuts off where a GPU rounds to bfloat16: a weight in float32 loses up to EPS_BF16; of a
# scale's parts the second loses 2^-14 of it, and what is multiplied by that, up to 2^-7, is rounded: 2^-15.
ROUNDINGS = {"exact": 0.0, "in float32": EPS_BF16, "in parts": EPS_BF16 / 2 * (1 + 2**-5)}


def shift_of(packed: Packed) -> Tensor:
    """What is added to every scaled value, [N, K] float64."""
    if packed.meaning != LINEAR:
        return torch.zeros(packed.out_features, packed.in_features).double()
    scales, offsets = packed.scales.double(), torch.zeros(()).double()
    zeros = torch.tensor(packed.center).double() if packed.zeros is None else packed.zeros.double()
    if packed.offsets is not None:
        offsets = packed.offsets.double()
    if packed.steps is not None:
        scales = scales * packed.steps.scales.double().repeat_interleave(packed.steps.ratio, dim=0)
        if packed.steps.offsets is not None:
            offsets = offsets * packed.steps.offsets.double().repeat_interleave(packed.steps.ratio, dim=0)
    shift = scales * (packed.base - zeros) * packed.factor + offsets
    return shift.T.repeat_interleave(packed.group_size, dim=1)[:, : packed.in_features]


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_affine(bits: int, num_tokens: int) -> None:
    """Bug: a plane shifted by another, a group's scale used for its neighbour, a short last block read past its end."""
    in_features = 1000 if bits == 4 else 500  # not a whole block of any width; two splits of 4 and of 8 bits
    weights = random_affine(bits, in_features, N, 32, torch.float16, seed=bits)
    check(AffineTriton().prepare(weights), weights, num_tokens)


@pytest.mark.parametrize("num_tokens", [2, 65])
def test_affine_parameters(num_tokens: int) -> None:
    """Bug: offsets, float zeros or the one zero point of a symmetric format left out or scaled wrongly."""
    plain = random_affine(4, 176, N, 16, torch.float32, seed=3)
    one = torch.tensor([[5]], dtype=torch.uint8).expand(plain.scales.shape)
    nested = random_nested(4, 512, N, 32, seed=3)
    steps = nested.nested
    assert steps is not None
    for weights in (
        replace(plain, zeros=(plain.zeros + 0.3).half()),
        replace(plain, zeros=one),
        random_minima(4, 176, N, 16, seed=3),
        random_minima(8, 96, N, 32, seed=3),
        nested,
        replace(
            nested, offsets=None, nested=replace(steps, offsets=None, offset_steps=None), zeros=one[:, :1].expand(N, 16)
        ),
        random_affine(8, 45, N, 45, torch.bfloat16, seed=3),  # a whole row is a group
        random_affine(5, 64, N, 32, torch.float16, seed=3),  # stored as 8 bits
        random_affine(1, 64, N, 32, torch.float16, seed=3),  # stored as 2
    ):
        check(AffineTriton().prepare(weights), weights, num_tokens)


@pytest.mark.parametrize("num_tokens", [2, 65])
@pytest.mark.parametrize("table", [TERNARY, BINARY, E2M1, NF4, IQ4], ids=["ternary", "binary", "e2m1", "nf4", "iq4_nl"])
def test_table(table: tuple[float, ...], num_tokens: int) -> None:
    """Bug: a subnormal of E2M1 taken for 0, a sign lost, bytes of one code given to another."""
    for scale_dtype in (torch.float16, torch.float8_e8m0fnu, torch.float8_e4m3fn):
        weights = random_table(table, 176, N, 16, scale_dtype, seed=2)
        check(TableTriton().prepare(weights), weights, num_tokens)


def test_many_rows_have_whole_scales() -> None:
    """Bug: a scale of float16 rounded to bfloat16, by up to 2^-7 of it where the interpreter cuts off. Only where all
    has one sign does that exceed what rounding each weight may do."""
    weights = random_affine(4, 64, N, 32, torch.float16, seed=3)
    scales, none = torch.full_like(weights.scales, 1 + 2**-7 - 2**-10), torch.zeros_like(weights.zeros)
    weights = replace(weights, scales=scales, zeros=none)
    found = product(torch.ones(65, 64).bfloat16(), AffineTriton().prepare(weights))
    sums = weights.dequantize().double().sum(1).expand(65, N)
    assert_within(found, sums, (ROUNDINGS["in parts"] + 64 * EPS) * sums)


@pytest.mark.parametrize(("group_size", "each"), [(16, 4), (32, 2), (128, 1)])
def test_exact_scales(group_size: int, each: int) -> None:
    """Scales of several groups in a plane, and one of several planes. Bug: a neighbour's scale; powers of two that
    leave bfloat16 when 2^126 is multiplied in."""
    weights = random_table(E2M1, 512, N, group_size, torch.float8_e8m0fnu, seed=2)
    exponents = weights.scales.view(torch.uint8).clone()
    exponents[0], exponents[1] = 120, 237  # 2^-7 and 2^110: as far apart as can be
    for changed in (weights, replace(weights, scales=exponents.view(torch.float8_e8m0fnu), factor=2.0**-10)):
        packed = TableTriton().prepare(changed)
        assert packed.groups_of_plane == each
        for num_tokens in (2, 65):
            check(packed, changed, num_tokens)


@pytest.mark.parametrize(("num_tokens", "rows"), [(8, 3), (16, 9), (64, 20)])
def test_a_row_does_not_depend_on_its_batch(num_tokens: int, rows: int) -> None:
    """Bug: splits chosen by the number of rows. Within an entry of the table results are the same to the last bit."""
    packed = AffineTriton().prepare(random_affine(4, 1040, N, 16, torch.float16, seed=1))
    assert grid_for(rows, N, packed.num_blocks).config == grid_for(num_tokens, N, packed.num_blocks).config
    assert grid_for(rows, N, packed.num_blocks).num_splits > 1
    x = activations(num_tokens, packed.in_features)
    assert torch.equal(product(x[:rows].clone(), packed), product(x, packed)[:rows])


def test_a_fixed_row_does_not_depend_on_any_batch() -> None:
    """Bug: the table's entry still chosen by the number of rows."""
    weights = random_affine(2, 528, N, 16, torch.float16, seed=1)
    kernel, x = AffineTriton(fixed=True), activations(70, 528)
    joined = kernel.join([kernel.prepare(weights)])
    (whole,) = kernel.linear(x, joined)
    for rows in (1, 9, 30):
        assert torch.equal(kernel.linear(x[:rows], joined)[0], whole[:rows])
    assert_within(whole, x.double() @ weights.dequantize().double().T, EPS_BF16 * whole.double().abs() + 1e-3)


def test_results_are_bfloat16_for_each_matrix() -> None:
    kernel, x = AffineTriton(), activations(3, 64)
    terms = [random_affine(4, 64, rows, 32, torch.float16, seed=rows) for rows in (5, 17)]
    results = kernel.linear(x, kernel.join([kernel.prepare(term) for term in terms]))
    for term, result in zip(terms, results, strict=True):
        exact = x.double() @ term.dequantize().double().T
        assert result.dtype == torch.bfloat16
        assert_within(result, exact, EPS_BF16 * exact.abs() + 1e-3)
    with pytest.raises(ValueError, match=r"\(2, 63\).*64"):
        kernel.linear(activations(2, 63), kernel.join([kernel.prepare(terms[0])]))
    with pytest.raises(ValueError, match=r"bfloat16, found torch\.float32"):
        kernel.linear(torch.zeros(2, 64), kernel.join([kernel.prepare(terms[0])]))
    assert kernel.linear(activations(0, 64), kernel.join([kernel.prepare(terms[0])]))[0].shape == (0, 5)


@pytest.mark.parametrize("num_tokens", [3, 65])
def test_joined_matrices_give_what_each_gives_alone(num_tokens: int) -> None:
    """Bug: results of one matrix among another's rows, parameters of another's groups, parts of sums mixed up."""
    rows, x = (128, 128, 19), activations(num_tokens, 256)
    plain = [random_affine(4, 256, count, 64, torch.float16, seed=count) for count in rows]
    nested = [random_nested(4, 256, count, 32, seed=count) for count in rows[1:]]
    floats = [random_table(E2M1, 256, count, 16, torch.float8_e4m3fn, seed=count) for count in rows[:2]]
    cases: list[tuple[Any, list[Any]]] = [
        (AffineTriton(), plain),
        (AffineTriton(True), nested),
        (TableTriton(), floats),
    ]
    for kernel, terms in cases:
        prepared = [kernel.prepare(term) for term in terms]
        joined = kernel.join(prepared)
        assert [packed.rows for packed in joined] == [tuple(packed.out_features for packed in prepared)]
        for packed, found in zip(prepared, kernel.linear(x, joined), strict=True):
            assert torch.equal(found, kernel.linear(x, (packed,))[0])


def test_what_cannot_be_one_matrix_is_multiplied_one_by_one() -> None:
    """Bug: one matrix's factor, zero point or kind of parameters for another; a program with rows of two."""
    weights = random_affine(4, 64, 128, 32, torch.float16, seed=1)
    first = AffineTriton().prepare(weights)
    short = AffineTriton().prepare(random_affine(4, 64, 64, 32, torch.float16, seed=1))
    wide = AffineTriton().prepare(random_affine(4, 64, 128, 32, torch.float32, seed=1))
    for other in (wide, replace(first, factor=0.5), replace(first, zeros=None, center=8)):
        assert AffineTriton().join([first, other]) == (first, other)
    assert AffineTriton().join([short, first]) == (short, first)
    assert len(AffineTriton().join([first, short])) == 1
    assert len(AffineTriton().join([first] * 4)) == 4


def test_every_entry_of_the_table_is_reached() -> None:
    used = [grid_for(num_tokens, N, 9).config for num_tokens in (1, 9, 17, 65)]
    assert tuple(used) == default_configs().entries


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 45, 1100])
def test_norm(width: int) -> None:
    """Two roundings to bfloat16, each cut off by the interpreter, and a few in float32. Bug: the sum that is returned
    is not the one that was normalized."""
    x, delta, weight = activations(3, width), activations(3, width).flip(0), activations(1, width)[0]
    total, normed = NormTriton().add_rms_norm(x, delta, weight, 1e-5)
    exact = x.double() + delta.double()
    assert_within(total, exact, EPS_BF16 * exact.abs())
    for rows, found in ((total, normed), (x, NormTriton().rms_norm(x, weight, 1e-5))):
        wide = rows.double()
        expected = weight.double() * wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        assert_within(found, expected, (8 * EPS + 2 * EPS_BF16) * expected.abs())


@pytest.mark.parametrize("head_dim", [2, 10, 64])
def test_rope(head_dim: int) -> None:
    """Bug: keys, of which there are fewer heads, turned by the angles of another token."""
    x = activations(3, 4 * head_dim).view(3, 4, head_dim)
    angles = torch.randn(3, head_dim // 2, generator=torch.Generator().manual_seed(3))
    low, high = x.double().chunk(2, dim=-1)
    turned = torch.complex(low, high) * torch.polar(torch.ones(()).double(), angles.double())[:, None]
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    size = turned.abs().repeat(1, 1, 2)  # an element may cancel; its error is that of the pair
    q, k = RopeTriton().rotate_pair(x, x[:, :1], angles.cos(), angles.sin())
    assert_within(q, expected, 4 * EPS * size + EPS_BF16 * expected.abs())
    assert torch.equal(k, q[:, :1])


def test_swiglu() -> None:
    gate, up = 10 * activations(7, 333), activations(7, 333).flip(0)
    gate[0, :3] = torch.tensor([-80.0, 0.0, 80.0])
    wide = gate.double()
    expected = wide / (1 + (-wide).exp()) * up.double()
    # exp(-gate) inherits the rounding of its argument: relative error |gate| eps
    bound = (6 * EPS + EPS_BF16 + EPS * wide.abs()) * expected.abs()
    assert_within(ActivationTriton().swiglu(gate, up), expected, bound)
