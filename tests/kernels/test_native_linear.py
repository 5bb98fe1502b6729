"""Integer dot products in C++: every form of weights on every instruction set against float64.

Activations are rounded to 8 bits as kernels/native/linear.hpp says, here in torch; what is left is rounding in float32,
held to the bound of a dot product. A second, looser test goes back to the activations as they were.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels import native
from kernels.linear.bitstream import pack_codes
from tests.kernels.weights import random_nested
from tests.tolerance import assert_within, dot_bound

if native.MISSING is not None:
    pytest.skip(native.MISSING, allow_module_level=True)

from kernels.linear.affine.native import AffineNative
from kernels.native import _native

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
BELOW = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0)
NF4 = (*BELOW, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0)
MXFP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
FP4 = tuple(value / 12 for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))  # needs two planes, exact in them
TABLES = {"nf4": NF4, "mxfp4": MXFP4, "fp4": (*FP4, *(-value for value in FP4)), "signs": (-1.0, 1.0)}
SCALE_TYPES = ("float16", "bfloat16", "float32", "e8m0", "e4m3")
SHAPES = [
    *((1, 64, 48, 32), (17, 96, 33, 16), (3, 512, 7, 128), (13, 1088, 40, 64), (5, 45, 19, 45), (7, 330, 40, 1000)),
    *((11, 4144, 70, 16), (3, 5000, 21, 5000)),  # three slabs
]
MAX_TOKENS = 33


@dataclass(frozen=True)
class Case:
    """A matrix and what it means."""

    packed: "_native.Packed"
    matrix: Tensor  # [N, K] float64
    table_error: float  # of an entry of its table, relative to the scale
    scales: Tensor  # [N, K] float64, factors included


def scales_of(scale_type: str, shape: tuple[int, int], random: torch.Generator) -> tuple[Tensor, Tensor]:
    """As stored, and in float64."""
    if scale_type == "e8m0":
        stored = torch.randint(120, 130, shape, generator=random, dtype=torch.uint8)
        return stored, torch.exp2(stored.double() - 127)
    if scale_type == "e4m3":
        stored = torch.randint(0, 126, shape, generator=random, dtype=torch.uint8)
        return stored, stored.view(torch.float8_e4m3fn).double()
    stored = (torch.rand(shape, generator=random) + 0.1).to(getattr(torch, scale_type))
    return stored, stored.double()


def make(
    bits: int, kind: str, k: int, n: int, group_size: int, scale_type: str = "float16", *, with_factors: bool = False
) -> Case:
    """kind: 'constant', 'uint8' or 'float32' zero points, 'offsets', 'ternary', or the name of a table."""
    random = torch.Generator().manual_seed(bits * k + n)
    group_size = max(group_size, k) if kind == "ternary" else group_size
    shape = (n, -(-k // group_size))
    codes = torch.randint(0, 3 if kind == "ternary" else 2**bits, (n, k), generator=random, dtype=torch.uint8)
    stored, scales = scales_of(scale_type, shape, random)
    factors = torch.rand(n, generator=random) + 0.5 if with_factors else None
    zeros, offsets, table, zero = None, None, TABLES.get(kind), 0
    if kind == "uint8":
        zeros = torch.randint(0, 2**bits, shape, generator=random, dtype=torch.uint8)
    elif kind == "float32":
        zeros = torch.rand(shape, generator=random) * 2**bits
    elif kind == "offsets":
        offsets = torch.rand(shape, generator=random) * -(2**bits)
    elif table is None:
        zero = 1 if kind == "ternary" else 2 ** (bits - 1)

    def spread(groups: Tensor) -> Tensor:
        return groups.double().repeat_interleave(group_size, 1)[:, :k]

    values = codes.double() - (zero if zeros is None else spread(zeros))
    if table is not None:
        values = torch.tensor(table, dtype=torch.float32).double()[codes.long()]
    packed = _native.pack(
        bits,
        k,
        group_size,
        pack_codes(codes, bits),
        stored,
        zeros,
        zero,
        table,
        scale_type if scale_type.startswith("e") else None,
        factors,
        kind == "ternary",
        offsets,
    )
    wide = spread(scales) * (1.0 if factors is None else factors.double().unsqueeze(1))
    table_error = 0.5 / 16383 if kind == "nf4" else 0.0
    added = 0.0 if offsets is None else spread(offsets) * (1.0 if factors is None else factors.double().unsqueeze(1))
    return Case(packed, values * wide + added, table_error, wide)


def activations(num_tokens: int, k: int) -> Tensor:
    return torch.randn(num_tokens, k, generator=torch.Generator().manual_seed(9))


def rounded(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """x as the kernels see it, and the step of each element, both [num_tokens, k] float64."""
    num_tokens, k = x.shape
    blocks = torch.nn.functional.pad(x, (0, -k % block)).view(num_tokens, -1, block)
    peak = blocks.abs().amax(-1, keepdim=True)
    codes = torch.round(blocks * torch.where(peak > 0, 127 / peak, 0.0))
    step = (peak / 127).double()
    return (codes.double() * step).flatten(1)[:, :k], step.expand(blocks.shape).flatten(1)[:, :k]


def multiply(case: Case, x: Tensor) -> Tensor:
    out = torch.full((x.shape[0], case.packed.num_rows), torch.nan)
    _native.Group([case.packed]).run(x.data_ptr(), x.shape[0], [out.data_ptr()])
    return out


def check(case: Case, num_tokens: int) -> None:
    x = activations(num_tokens, case.packed.num_channels)
    near, _ = rounded(x, case.packed.block_channels)
    bound = dot_bound(near, case.matrix) + case.table_error * (near.abs() @ case.scales.abs().T)
    for isa in _native.supported_isas():
        _native.use_isa(isa)
        assert_within(multiply(case, x), near @ case.matrix.T, bound, isa)


@pytest.mark.parametrize("kind", ["constant", "uint8", "float32", "offsets"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_affine(bits: int, kind: str) -> None:
    """Bug: a plane of bits, a zero point or a scale laid down in one place and read in another."""
    for i, (num_tokens, k, n, group_size) in enumerate(SHAPES):
        scale_type = SCALE_TYPES[(i + bits) % len(SCALE_TYPES)]
        check(make(bits, kind, k, n, group_size, scale_type, with_factors=i % 2 == 1), num_tokens)


@pytest.mark.parametrize(("bits", "group_size"), [(2, 16), (4, 32), (5, 32), (6, 16)])
def test_nested_scales(bits: int, group_size: int) -> None:
    """Bug: a byte without its sign, or the step of another superblock."""
    weights = random_nested(bits, 768, 37, group_size, seed=bits)
    spread = weights.scales.double().repeat_interleave(group_size, 1)
    check(Case(AffineNative().prepare(weights), weights.dequantize().double(), 0.0, spread), 5)


@pytest.mark.parametrize("scale_type", SCALE_TYPES)
def test_every_scale_type_in_short_blocks_and_whole_rows(scale_type: str) -> None:
    for num_tokens, k, n, group_size in SHAPES:
        check(make(4, "uint8", k, n, group_size, scale_type), num_tokens)


@pytest.mark.parametrize(("bits", "kind"), [(4, "nf4"), (4, "mxfp4"), (4, "fp4"), (1, "signs"), (2, "ternary")])
def test_tables_and_ternary(bits: int, kind: str) -> None:
    """Bug: a table whose entries pass one signed byte, or five digits a byte whose last digit is off by one."""
    for i, (num_tokens, k, n, group_size) in enumerate(SHAPES):
        check(make(bits, kind, k, n, group_size, SCALE_TYPES[i % len(SCALE_TYPES)]), num_tokens)


def test_unrounded_activations_are_within_half_a_step_of_each() -> None:
    """Bug: blocks of activations with the scale of a neighbour, which the test's own rounding would repeat."""
    case = make(4, "constant", 1088, 40, 64)
    x = activations(5, 1088)
    near, step = rounded(x, case.packed.block_channels)
    bound = dot_bound(near, case.matrix) + (step / 2 * (1 + 1e-6)) @ case.matrix.abs().T
    assert_within(multiply(case, x), x.double() @ case.matrix.T, bound)


def test_a_scale_wrong_by_one_step_is_seen() -> None:
    """The bound is tight enough: the next float16 in one of 17 groups of one row passes it."""
    case = make(4, "constant", 1088, 40, 64)
    x = activations(5, 1088)
    near, _ = rounded(x, case.packed.block_channels)
    wrong = case.matrix.clone()
    wrong[7, 64:128] *= 1 + 2.0**-10
    with pytest.raises(AssertionError, match="exceeds the bound"):
        assert_within(multiply(case, x), near @ wrong.T, dot_bound(near, wrong))


FORMS = [(bits, "constant") for bits in (2, 3, 4, 5, 6, 8)]
FORMS += [(4, "uint8"), (4, "float32"), (4, "offsets"), (4, "nf4"), (4, "mxfp4"), (2, "ternary")]


def test_same_bits_across_slabs() -> None:
    """Bug: sums of a slab that a narrower tile, or a chunk that begins inside a panel, carries on differently."""
    case = make(4, "constant", 4208, 150, 16)
    x = activations(15, 4208)
    expected = multiply(case, x)
    for isa in _native.supported_isas():
        _native.use_isa(isa)
        for num_tokens in (1, 3, 7, 15):
            assert torch.equal(multiply(case, x[:num_tokens]), expected[:num_tokens]), (isa, num_tokens)


@pytest.mark.parametrize(("bits", "kind"), FORMS)
def test_same_bits_whatever_shares_the_call(bits: int, kind: str) -> None:
    """Bug: a tile, a chunk or an instruction set that adds in another order."""
    case, other = make(bits, kind, 352, 75, 32), make(bits, kind, 352, 16, 32)
    x = activations(MAX_TOKENS, 352)
    expected = multiply(case, x)
    for isa in _native.supported_isas():
        _native.use_isa(isa)
        for num_threads in (1, 2):
            _native.set_num_threads(num_threads)
            for num_tokens in range(1, MAX_TOKENS + 1) if isa != "scalar" else (1, 7, MAX_TOKENS):
                first = MAX_TOKENS - num_tokens
                assert torch.equal(multiply(case, x[first:]), expected[first:]), (isa, num_threads, num_tokens)
        pair = [torch.empty(MAX_TOKENS, 16), torch.empty(MAX_TOKENS, 75)]
        group = _native.Group([other.packed, case.packed])
        group.run(x.data_ptr(), MAX_TOKENS, [out.data_ptr() for out in pair])
        assert torch.equal(pair[1], expected), isa


def test_activations_of_zeros_tiny_and_not_finite() -> None:
    """Bug: 127 / 0, a quotient that overflows, or a NaN of one token in another token's row."""
    case = make(4, "constant", 64, 17, 32)
    x = activations(4, 64)
    x[0], x[1], x[2, 40] = 0.0, 1e-40, torch.inf
    for isa in _native.supported_isas():
        _native.use_isa(isa)
        out = multiply(case, x)
        assert torch.equal(out[:2], torch.zeros(2, 17)), isa
        assert out[2].isnan().all(), isa
        assert out[3].isfinite().all(), isa


def arguments(**changed: object) -> dict[str, object]:
    base: dict[str, object] = {"bits": 4, "num_channels": 64, "group_size": 32, "zero": 0}
    return base | {"codes": torch.zeros(8, 32, dtype=torch.uint8), "scales": torch.ones(8, 2)} | changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bits": 7, "codes": torch.zeros(8, 56, dtype=torch.uint8)}, "7 bits"),
        ({"bits": 0}, "bits must be 1..8"),
        ({"num_channels": 2**62}, "num_channels is too large"),
        ({"num_channels": 0}, "must be positive"),
        ({"group_size": -1}, "must be positive"),
        ({"group_size": 2**62}, "8 x 1"),
        ({"group_size": 24, "scales": torch.ones(8, 3)}, "multiple of 16"),
        ({"codes": torch.zeros(8, 31, dtype=torch.uint8)}, "31 bytes a row, expected 32"),
        ({"codes": torch.zeros(0, 32, dtype=torch.uint8), "scales": torch.ones(0, 2)}, "at least one row"),
        ({"scales": torch.ones(2, 8)}, "8 x 2"),
        ({"scales": torch.ones(8, 2, dtype=torch.uint8)}, "with a scale_type"),
        ({"scales": torch.ones(8, 2), "scale_type": "e8m0"}, "given as uint8"),
        ({"scales": torch.full((8, 2), 255, dtype=torch.uint8), "scale_type": "e8m0"}, "NaN"),
        ({"scales": torch.full((8, 2), 127, dtype=torch.uint8), "scale_type": "e4m3"}, "NaN"),
        ({"scales": torch.ones(8, 2, dtype=torch.uint8), "scale_type": "e5m2"}, "not 'e5m2'"),
        ({"zero": 2**30}, "zero must lie within"),
        ({"zeros": torch.ones(8, 2, dtype=torch.int32)}, "uint8 or float32"),
        ({"table": [0.0] * 17}, "at most 16"),
        ({"table": [torch.inf]}, "finite"),
        ({"table": [1.0], "zero": 1}, "no zero point"),
        ({"factors": torch.ones(7)}, "8 contiguous float32"),
        ({"ternary": True}, "given in 2 bits"),
        ({"bits": 2, "codes": torch.zeros(8, 16, dtype=torch.uint8), "ternary": True}, "use 2 bits for groups"),
        (
            {
                "bits": 2,
                "codes": torch.full((8, 16), 3, dtype=torch.uint8),
                "ternary": True,
                "group_size": 64,
                "scales": torch.ones(8, 1),
            },
            "0, 1 or 2",
        ),
    ],
)
def test_what_cannot_be_packed_is_refused_by_name(changed: dict[str, object], message: str) -> None:
    """Bug: sizes that overflow or are never compared, and end in a read past the end."""
    with pytest.raises(ValueError, match=message):
        _native.pack(**arguments(**changed))  # type: ignore[arg-type]
