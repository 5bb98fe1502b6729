"""Weights times activations that a format rounds to integers, in C++: codes to the bit, sums to the integer."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels import native
from kernels.linear.int8.layout import Int8Weights
from kernels.linear.int8.reference import Int8Reference
from kernels.linear.joined import Joined
from kernels.linear.rounding import Rounding
from tests.kernels.weights import random_int8
from tests.tolerance import EPS, assert_within

if native.MISSING is not None:
    pytest.skip(native.MISSING, allow_module_level=True)

from kernels.linear.int8.native import Int8Native
from kernels.native import _native
from kernels.native.recording import Buffers, Recording

KERNEL = Int8Native()
MAX_TOKENS = 33
SPAN = 32768  # channels whose products one integer adds up


def fixed(scale: float, zero: int = 0, bits: int = 8) -> Rounding:
    zeros = torch.tensor([float(zero)]) if zero else None
    return Rounding("int", bits, symmetric=zero == 0, scale=torch.tensor([scale]), zero=zeros)


ROUNDINGS = {
    "token": Rounding("int", 8),
    "token, asymmetric": Rounding("int", 8, symmetric=False),
    "token, 4 bits": Rounding("int", 4),
    "token, 5 bits, asymmetric": Rounding("int", 5, symmetric=False),
    "fixed": fixed(0.0173),
    "fixed, asymmetric": fixed(0.031, -77),
    "fixed, 4 bits, asymmetric": fixed(0.25, 7, bits=4),
}


def multiply(weights: Int8Weights, x: Tensor) -> Tensor:
    joined = KERNEL.join([KERNEL.prepare(weights)])
    assert joined is not None
    return KERNEL.linear(x, joined)[0]


def on_every_isa(weights: Int8Weights, x: Tensor) -> Tensor:
    """The product, once all instruction sets agree on its bits."""
    first = multiply(weights, x)
    for isa in _native.supported_isas():
        _native.use_isa(isa)
        assert torch.equal(multiply(weights, x), first), isa
    return first


def activations(num_tokens: int, k: int) -> Tensor:
    """Tokens of other sizes and other middles."""
    random = torch.Generator().manual_seed(k)
    x = torch.randn(num_tokens, k, generator=random) * torch.rand(num_tokens, 1, generator=random) * 3
    return x + torch.randn(num_tokens, 1, generator=random)


def matrix(weights: Int8Weights) -> Tensor:
    """(code - zero) scale, [N, K] float64."""

    def spread(parameters: Tensor) -> Tensor:
        return parameters.double().repeat_interleave(weights.group_size, 1)[:, : weights.in_features]

    zeros = 0.0 if weights.zeros is None else spread(weights.zeros)
    return (weights.weight.double() - zeros) * spread(weights.scales)


def first_rows(weights: Int8Weights, count: int) -> Int8Weights:
    zeros = None if weights.zeros is None else weights.zeros[:count]
    return replace(weights, weight=weights.weight[:count], scales=weights.scales[:count], zeros=zeros)


@pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=list(ROUNDINGS))
@pytest.mark.parametrize("k", [1, 45, 300])
def test_codes_are_those_of_the_format(k: int, rounding: Rounding) -> None:
    """A matrix of ones on the diagonal gives the rounded activations back: to the bit, from tiny to huge ones.

    Bug: a reciprocal in place of a division, ties away from zero, or a scale over a part of the token.
    """
    weight = torch.eye(k, dtype=torch.int8)
    x = activations(MAX_TOKENS, k) * torch.exp2(torch.linspace(-140, 120, MAX_TOKENS)).unsqueeze(1)
    x[3], x[4, 0], x[5] = 0.0, -0.0, x[5].abs()
    step = 1.0 if rounding.scale is None else float(rounding.scale)
    x[6:8] = step * (torch.arange(k) - k // 2 + 0.5)  # ties, as far as a product of floats can be one
    for group in (k, 16):
        scales = torch.ones(k, -(-k // group))
        assert torch.equal(on_every_isa(Int8Weights(8, group, weight, scales, None, rounding), x), rounding.apply(x))


@pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=list(ROUNDINGS))
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_a_row_of_one_scale_is_rounded_three_times(bits: int, rounding: Rounding) -> None:
    """The integer to a float, and two products: 3/2 eps |y|. Beside them x^ itself was rounded, by eps/2 of each.

    Bug: a zero point counted for channels that are padding, or sums in floats that lose bits before the scales.
    """
    for num_tokens, k, n in ((1, 64, 48), (17, 45, 33), (5, 1, 1), (9, 330, 40), (6, 5000, 21)):
        weights = random_int8(bits, k, n, k, rounding, seed=bits)
        x = activations(num_tokens, k)
        for one in (weights, replace(weights, zeros=None)):
            near, exact = rounding.apply(x).double(), matrix(one)
            y = near @ exact.T
            bound = EPS * (1 + 8 * EPS) * (1.5 * y.abs() + 0.5 * (near.abs() @ exact.abs().T))
            assert_within(on_every_isa(one, x), y, bound, f"{k} channels")


@pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=list(ROUNDINGS))
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 128), (8, 48), (3, 16), (6, 64)])
def test_groups_add_up_in_float32(bits: int, group: int, rounding: Rounding) -> None:
    """One fused multiply-add a block: rounded as often as there are blocks, by eps/2 of the sum so far at most.

    Bug: the scale, the zero point or the sums of codes of a neighbouring block.
    """
    for num_tokens, k, n in ((3, 4144, 70), (9, 1104, 19), (17, 40, 33)):
        weights = random_int8(bits, k, n, group, rounding, seed=bits)
        x = activations(num_tokens, k)
        blocks = -(-k // KERNEL.prepare(weights).packed.block_channels)
        for one in (weights, replace(weights, zeros=None)):
            near, exact = rounding.apply(x).double(), matrix(one)
            # Two more for the products with scales; x^ itself was rounded once.
            bound = (blocks + 2 + 1) * EPS / 2 * (1 + blocks * EPS) * (near.abs() @ exact.abs().T)
            assert_within(on_every_isa(one, x), near @ exact.T, bound, f"{k} channels")


@pytest.mark.parametrize("k", [SPAN, 40000])
@pytest.mark.parametrize(("weight", "zero"), [(127, None), (-128, None), (127, -128), (-128, 127)])
def test_the_largest_sums_do_not_overflow(weight: int, zero: int | None, k: int) -> None:
    """Every code at its end, the zero points at the other: 32,768 x 255 x 255 lies just below 2^31.

    Bug: a span of channels, or a zero point times a sum, beyond 32 bits.
    """
    zeros = None if zero is None else torch.full((3, 1), zero, dtype=torch.int8)
    for high, low in ((127, -128), (-128, 127)):  # of activations, and their zero point
        rounding = fixed(1.0, low)
        weights = Int8Weights(
            8, k, torch.full((3, k), weight, dtype=torch.int8), torch.full((3, 1), 0.5), zeros, rounding
        )
        x = torch.full((9, k), 2.0 * (high - low))  # passes the last code
        product = (high - low) * (weight - (zero or 0))
        runs = [min(SPAN, k - start) * product for start in range(0, k, SPAN)]
        expected = torch.tensor(runs).float().sum() * 0.5  # of at most two: in order
        assert torch.equal(on_every_isa(weights, x), expected.expand(9, 3))


@pytest.mark.parametrize(
    ("bits", "k", "group"), [(8, 4208, 4208), (8, 352, 32), (4, 4208, 4208), (4, 352, 16), (5, 352, 352)]
)
def test_same_bits_whatever_shares_the_call(bits: int, k: int, group: int) -> None:
    """Bug: a tile, a chunk or an instruction set that adds or rounds in another order, at the ends of slabs too."""
    weights = random_int8(bits, k, 75, group, ROUNDINGS["token, asymmetric"], seed=k)
    x = activations(MAX_TOKENS, k)
    for one in (weights, replace(weights, zeros=None, rounding=ROUNDINGS["token"])):
        prepared = KERNEL.prepare(one)
        pair = KERNEL.join([KERNEL.prepare(first_rows(one, 16)), prepared])
        alone = KERNEL.join([prepared])
        assert alone is not None
        assert pair is not None
        (expected,) = KERNEL.linear(x, alone)
        for isa in _native.supported_isas():
            _native.use_isa(isa)
            for num_threads in (1, 2):
                _native.set_num_threads(num_threads)
                for num_tokens in range(1, MAX_TOKENS + 1) if isa != "scalar" else (1, 7, MAX_TOKENS):
                    first = MAX_TOKENS - num_tokens
                    (found,) = KERNEL.linear(x[first:], alone)
                    assert torch.equal(found, expected[first:]), (isa, num_threads, num_tokens)
            some_rows, all_rows = KERNEL.linear(x, pair)
            assert torch.equal(all_rows, expected)
            assert torch.equal(some_rows, expected[:, :16])


@pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=list(ROUNDINGS))
def test_activations_that_are_not_finite(rounding: Rounding) -> None:
    """As the reference: a NaN spoils its token, infinity too unless a fixed scale clamps it, and no other token."""
    weights = random_int8(8, 64, 17, 64, rounding, seed=3)
    x = activations(12, 64)
    x[1, 40], x[2, 3], x[3, 63] = torch.nan, torch.inf, -torch.inf
    x[9, 0], x[9, 1] = 3e38, -3e38
    expected = Int8Reference().linear(x, (weights,))[0]
    for isa in _native.supported_isas():
        _native.use_isa(isa)
        found = multiply(weights, x)
        assert torch.equal(found.isnan(), expected.isnan()), isa
        assert found[[0, 4, 8, 11]].isfinite().all(), isa


def test_a_recorded_step_rounds_what_it_reads() -> None:
    """Bug: a call that torch has a part in, which keeps a model's layers from being one native call."""
    weights, x = random_int8(8, 64, 17, 64, ROUNDINGS["token, asymmetric"], seed=3), activations(2, 64)
    expected, joined = multiply(weights, x), KERNEL.join([KERNEL.prepare(weights)])
    assert joined is not None
    held, recording = torch.zeros(2, 64), Recording(Buffers(2))
    with recording:
        (out,) = KERNEL.linear(held, joined)
    held.copy_(x)
    recording.run()
    assert torch.equal(out, expected)


def test_only_what_is_rounded_alike_is_joined() -> None:
    """Bug: matrices read activations rounded for others, or in the blocks of others."""
    row, groups = (random_int8(8, 64, 5, group, ROUNDINGS["token"], seed=1) for group in (64, 32))
    symmetric = replace(row, zeros=None)
    half = replace(symmetric, bits=4, weight=symmetric.weight >> 4)
    others = [replace(row, rounding=ROUNDINGS[name]) for name in ("token, 4 bits", "fixed", "token, asymmetric")]
    first = KERNEL.prepare(row)
    assert isinstance(KERNEL.join([first, KERNEL.prepare(row)]), Joined)
    for other in (groups, symmetric, *others):
        assert KERNEL.join([first, KERNEL.prepare(other)]) is None
    assert KERNEL.join([KERNEL.prepare(symmetric), KERNEL.prepare(half)]) is None


def test_what_cannot_be_joined_is_refused_by_name() -> None:
    """Bug: sums of another matrix read past their end, or a table multiplied as if it held integers."""
    row, groups = (KERNEL.prepare(random_int8(8, 64, 5, group, ROUNDINGS["token"], seed=1)) for group in (64, 32))
    codes, scales = torch.zeros(5, 32, dtype=torch.uint8), torch.ones(5, 1)
    table = _native.pack(4, 64, 64, codes, scales, table=[0.0, 1.0])
    ternary = _native.pack(2, 64, 64, codes[:, :16].contiguous(), scales, zero=1, ternary=True)
    floats = _native.pack(4, 64, 64, codes, scales, zeros=torch.ones(5, 1))
    sums = torch.zeros(5, 1, dtype=torch.int32)
    cases: list[tuple[list[_native.Packed], int, float | None, int, list[Tensor], str]] = [
        ([], 8, None, 0, [], "at least one matrix"),
        ([row.packed, groups.packed], 8, None, 0, [], "the same groups"),
        ([table], 8, None, 0, [], "no integers"),
        ([ternary], 8, None, 0, [], "4 or 8 bits"),
        ([floats], 8, None, 0, [], "must be codes"),
        ([row.packed], 9, None, 0, [], "2 to 8 bits"),
        ([row.packed], 8, 1.0, 128, [sums], "-128..127"),
        ([row.packed], 8, 1.0, 1, [], "sums of codes go with"),
        ([row.packed], 8, None, 0, [sums], "sums of codes go with"),
        ([row.packed], 8, 1.0, 1, [sums[:4]], "one for each row and block"),
        ([row.packed], 8, 1.0, 1, [sums.float()], "contiguous int32"),
    ]
    for members, bits, scale, zero, code_sums, message in cases:
        with pytest.raises(ValueError, match=message):
            _native.Int8Group(members, bits, True, scale, zero, code_sums)


def test_a_zero_point_between_integers_is_refused() -> None:
    """Its codes would be others than the format's."""
    weights = random_int8(8, 64, 5, 64, replace(fixed(1.0, 1), zero=torch.tensor([0.5])), seed=1)
    with pytest.raises(ValueError, match=r"integer of 8 bits, found 0\.5"):
        KERNEL.prepare(weights)
