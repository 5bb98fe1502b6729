"""The table family: what its tables and its scales of one byte mean, and what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import native
from kernels.contract import LinearSpec
from kernels.linear.table.layout import SCALE_DTYPES, TableWeights
from kernels.linear.table.native import TableNative
from kernels.linear.table.reference import TableReference
from kernels.linear.table.tables import BINARY, E2M1, FP4, NF4, TERNARY
from tests.kernels.weights import random_table, scales_by_hand, table_by_hand
from tests.tolerance import EPS, assert_within, dot_bound

TABLES = {
    "nf4": NF4,
    "fp4": FP4,
    "e2m1": E2M1,
    "ternary": TERNARY,
    "binary": BINARY,
    "five": (0.1, -0.7, 0.3, 2.0, 1.0),
}


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(("k", "group"), [(64, 16), (45, 16), (7, 100)])
def test_dequantize_is_the_formula(table: str, scale_dtype: torch.dtype, k: int, group: int) -> None:
    """Against codes cut out of one big integer and scales decoded bit by bit; entry, scale and product round once."""
    weights = random_table(TABLES[table], k, 5, group, scale_dtype, seed=k)
    expected = table_by_hand(weights)  # [5, k]
    assert_within(weights.dequantize(), expected, 3 * EPS / 2 * expected.abs())
    assert torch.equal(weights.dequantize_rows(1, 4), weights.dequantize()[1:4])


@pytest.mark.parametrize("table", TABLES)
def test_reference(table: str) -> None:
    weights = random_table(TABLES[table], 45, 33, 16, torch.float16, seed=2)
    x = torch.randn(5, 45, generator=torch.Generator().manual_seed(1))
    (result,) = TableReference().linear(x, (weights,))
    matrix = weights.dequantize().double()
    assert_within(result, x.double() @ matrix.T, dot_bound(x.double(), matrix))


def test_tables_are_the_formats_own() -> None:
    """E2M1 by its bits: sign, two of exponent (bias 1), one of fraction. FP4 as a 4-bit float of bitsandbytes."""
    for code in range(16):
        exponent, fraction = code >> 1 & 3, code & 1
        magnitude = fraction / 2 if exponent == 0 else (1 + fraction / 2) * 2.0 ** (exponent - 1)
        assert E2M1[code] == (-magnitude if code & 8 else magnitude)
    assert [FP4[1], FP4[3], FP4[10]] == pytest.approx([0.005208333, 1.0, -0.6666667])
    assert len(NF4) == 16
    assert list(NF4) == sorted(NF4)


def weights_with(
    bits: int = 2, table: tuple[float, ...] = TERNARY, code_bytes: int = 4, scale_dtype: torch.dtype = torch.float32
) -> TableWeights:
    codes = torch.full((3, code_bytes), 0b01100100, dtype=torch.uint8)
    return TableWeights(bits, 16, 16, codes, torch.ones(3, 1).to(scale_dtype), table)


def test_codes_past_the_end_of_a_short_table_are_refused() -> None:
    """A lookup would read whatever lies behind the table."""
    weights_with()
    codes = torch.tensor([[0b01100100, 0, 0, 0], [0b00001100, 0, 0, 0]], dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"codes reach 3, the table has entries 0\.\.2"):
        TableWeights(2, 16, 16, codes, torch.ones(2, 1), TERNARY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, r"bits must be 1\.\.4"),
        ({"bits": 1, "code_bytes": 2}, "table has 3 entries"),
        ({"code_bytes": 5}, "codes has shape"),
        ({"scale_dtype": torch.float64}, "scales must be"),
    ],
)
def test_fields_that_disagree_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weights_with(**change)


def rounding_bound(x: Tensor, weights: TableWeights, block: int) -> Tensor:
    """What rounding adds at most: activations to max / 127 of their block, entries to 1 / 16383 of the largest.

    |a x_scale - x| <= x_scale / 2 and |step u - entry| <= largest / 16383 / 2 for every channel; [num_tokens, N].
    """
    num_tokens, k = x.shape
    peaks = torch.nn.functional.pad(x, (0, -k % block)).view(num_tokens, -1, block).abs().amax(-1)
    half_steps = (peaks / 127 / 2).repeat_interleave(block, dim=1)[:, :k]  # [num_tokens, K]
    largest = max(abs(entry) for entry in weights.table)
    scales = torch.tensor(table_scales(weights), dtype=torch.float64).abs()  # [N, groups]
    entry_error = (scales * largest / 16383 / 2).repeat_interleave(weights.group_size, dim=1)[:, :k]  # [N, K]
    matrix = weights.dequantize().double().abs()
    return half_steps @ (matrix + entry_error).T + x.abs() @ entry_error.T


def table_scales(weights: TableWeights) -> list[list[float]]:
    return [[scale * weights.factor for scale in row] for row in scales_by_hand(weights.scales)]


@pytest.mark.skipif(native.MISSING is not None, reason=str(native.MISSING))
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(("num_tokens", "k", "n", "group"), [(1, 64, 48, 16), (9, 350, 33, 64), (3, 330, 5, 1000)])
def test_native(table: str, scale_dtype: torch.dtype, num_tokens: int, k: int, n: int, group: int) -> None:
    """Scales of one byte, the factor and the table reach the packed weights; the rest is test_native_linear.py's."""
    weights = random_table(TABLES[table], k, n, group, scale_dtype, seed=k)
    x = torch.randn(num_tokens, k, generator=torch.Generator().manual_seed(1))
    kernel = TableNative()
    packed = kernel.prepare(weights)
    joined = kernel.join([packed])
    assert joined is not None
    (result,) = kernel.linear(x, joined)
    exact, matrix = x.double(), weights.dequantize().double()
    bound = dot_bound(exact, matrix) + rounding_bound(exact, weights, packed.block_channels)
    assert_within(result, exact @ matrix.T, bound, table)


def test_native_refuses_groups_without_a_packed_form_and_rounding_where_it_must_not() -> None:
    spec = LinearSpec(64, 8, torch.device("cpu"), torch.float32, bits=4, group_size=20)
    if native.MISSING is not None:
        pytest.skip(native.MISSING)
    assert "groups of 20 channels" in str(TableNative().refuses(spec))
    exact = LinearSpec(64, 8, torch.device("cpu"), torch.float32, bits=4, group_size=32, exact_activations=True)
    assert "rounds activations" in str(TableNative().refuses(exact))
