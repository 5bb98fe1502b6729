"""Draws and log-probabilities of every back end against the definition, on rows that make the fast ways hard."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from kernels import native, sampling
from kernels.contract import Filters, RowSpec, SamplingKernel
from kernels.sampling.reference import SamplingReference

SPEC = RowSpec(1, torch.device("cpu"), torch.float32)
SIZES = [1, 5, 63, 4096, 5000, 70_001]  # within a vector, a piece, several pieces, pieces shared among threads
FILTERS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 1},
    {"temperature": 1.0, "top_k": 40},
    {"temperature": 1.0, "top_k": 10**6},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 3.0, "top_p": 0.999},
    {"temperature": 1.0, "top_p": 0.0},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.7, "min_p": 0.02},
    {"temperature": 1e-310, "top_p": 0.9},
    {"temperature": 1e6, "top_p": 0.5},  # every logit in one bucket
]


def random_row(size: int, kind: str, seed: int) -> torch.Tensor:
    row = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3
    if kind == "ties":
        row = row.round()
    elif kind == "equal":
        row = torch.full((size,), 2.5)
    elif kind == "banned":
        row[::2] = -math.inf
        row[-1] = 0.0
    elif kind == "steep":
        row = row * 100  # most weights vanish
    return row


KINDS = ["plain", "ties", "equal", "banned", "steep"]


@pytest.fixture(params=sampling.KERNELS[:-1], ids=lambda kernel: kernel.name)
def kernel(request: pytest.FixtureRequest) -> SamplingKernel:
    chosen: SamplingKernel = request.param
    reason = chosen.refuses(SPEC)
    if reason is not None:
        pytest.skip(reason)
    return chosen


@pytest.mark.parametrize("rules", FILTERS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_draws_are_those_of_the_definition(kernel: SamplingKernel, size: int, kind: str, rules: dict[str, Any]) -> None:
    """Bug: a candidate lost or added at the edge of a filter, ties in another order, an off-by-one in a sum."""
    reference, filters = SamplingReference(), Filters(**rules)
    row = random_row(size, kind, seed=size)
    uniforms = [0.0, 1 - 2**-53, *torch.rand(6, generator=torch.Generator().manual_seed(1)).tolist()]
    drawn = [kernel.draw(row, filters, uniform) for uniform in uniforms]
    assert drawn == [reference.draw(row, filters, uniform) for uniform in uniforms]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_argmax_takes_the_first_of_the_largest(kernel: SamplingKernel, size: int, kind: str) -> None:
    row = random_row(size, kind, seed=size)
    largest = float(row.max())
    assert kernel.argmax(row) == row.tolist().index(largest)


@pytest.mark.parametrize("where", [0, 63, 4095, 4096, 4999])
def test_argmax_refuses_nan_wherever_it_is(kernel: SamplingKernel, where: int) -> None:
    """Bug: comparisons with NaN are false, so a maximum steps over it unless it is looked for."""
    row = random_row(5000, "plain", seed=1)
    row[where] = math.nan
    assert kernel.argmax(row) is None
    row[where] = math.inf
    assert kernel.argmax(row) is None
    assert kernel.argmax(torch.full((3,), -math.inf)) is None
    with pytest.raises(ValueError, match="not finite"):
        kernel.draw(row, Filters(1.0), 0.5)


@pytest.mark.parametrize("num_top", [0, 1, 20, 10**6])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES[:-1])
def test_log_probs(kernel: SamplingKernel, size: int, kind: str, num_top: int) -> None:
    """The same ids in the same order; values within float64's rounding of a sum of `size` positive terms."""
    row = random_row(size, kind, seed=size)
    token = size // 2
    expected, expected_top = SamplingReference().log_probs(row, token, min(num_top, size))
    found, top = kernel.log_probs(row, token, num_top)
    assert [entry[0] for entry in top] == [entry[0] for entry in expected_top]
    bound = 1e-15 * (size + float(row[row.isfinite()].abs().max()))
    values = [(found, expected), *((a[1], b[1]) for a, b in zip(top, expected_top, strict=True))]
    assert all(a == b or abs(a - b) <= bound for a, b in values)


@contextmanager
def using(isa: str) -> Iterator[None]:
    from kernels.native import _native

    before = _native.isa()
    _native.use_isa(isa)
    try:
        yield
    finally:
        _native.use_isa(before)


@pytest.mark.skipif(native.MISSING is not None, reason=str(native.MISSING))
@pytest.mark.parametrize("num_threads", [1, 3])
def test_every_instruction_set_and_number_of_threads_gives_the_same_bits(num_threads: int) -> None:
    """Bug: sums over as many lanes as a vector happens to have, or over chunks of as many threads as there are."""
    from kernels.native import _native

    kernel, row, before = sampling.KERNELS[0], random_row(70_001, "plain", seed=3), _native.num_threads()
    results = []
    native.set_num_threads(num_threads)
    try:
        for isa in _native.supported_isas():
            with using(isa):
                draws = [kernel.draw(row, Filters(**rules), 0.37) for rules in FILTERS]
                results.append((kernel.argmax(row), kernel.log_probs(row, 7, 5), draws))
    finally:
        native.set_num_threads(before)
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("row", [torch.zeros(2, 3), torch.zeros(0), torch.zeros(3, dtype=torch.float64)])
def test_what_is_no_row_of_logits_is_refused(kernel: SamplingKernel, row: torch.Tensor) -> None:
    """Bug: memory read past the end of a tensor of another shape or type."""
    with pytest.raises(ValueError, match="row of float32"):
        kernel.argmax(row)
    with pytest.raises(ValueError, match="no token 3"):
        kernel.log_probs(torch.zeros(3), 3, 1)
