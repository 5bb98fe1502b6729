"""The one bound that numeric tests use. It is derived from the length of the sum, the dtype and the data, never tuned.

A dot product of k terms in floating point of precision eps makes k roundings. They are independent and unbiased for all
practical data, so the error grows like sqrt(k) times the rounding of a typical partial sum, and partial sums are of the
size of ||x o w||_2 (o: elementwise product):

    |computed - exact| <= 4 eps sqrt(k) ||x o w||_2     for every output element

Seen over many shapes and seeds, the worst error is 1.3 of eps sqrt(k) ||x o w||_2. The 1-norm in place of the 2-norm
would be sqrt(k) times looser and let a group's scale be wrong by a factor of 1.0001 (test_tolerance.py plants that).
"""

import math

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps


def dot_bound(x: Tensor, w: Tensor, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """Bound on x @ w^T accumulated in float32.  x: [num_tokens, k], w: [n, k], float64 -> [num_tokens, n].

    A result kept in a narrower dtype is rounded once more, by at most eps(out_dtype) |y|.
    """
    norm = (x.square() @ w.square().T).sqrt()  # [num_tokens, n]
    bound = 4 * EPS * math.sqrt(x.shape[-1]) * norm
    if out_dtype == torch.float32:
        return bound
    return bound + torch.finfo(out_dtype).eps * (x @ w.T).abs()


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor | float, what: str = "result") -> None:
    """Fail, saying where and by how much, when |actual - expected| exceeds `bound` (or is NaN) anywhere."""
    if actual.shape != expected.shape:
        raise AssertionError(f"{what} has shape {list(actual.shape)}, expected {list(expected.shape)}")
    exact, found = expected.double(), actual.double()
    limits = torch.as_tensor(bound, dtype=torch.float64).expand(exact.shape)
    error = (found - exact).abs()
    wrong = ~(error <= limits)  # a NaN is wrong
    if not bool(wrong.any()):
        return
    excess = torch.where(error.isnan(), torch.inf, error / limits.clamp_min(1e-300))
    worst = torch.unravel_index(excess.argmax(), excess.shape)
    where = [int(index) for index in worst]
    raise AssertionError(
        f"{what} at {where}: expected {float(exact[worst]):.9g}, found {float(found[worst]):.9g}, error "
        f"{float(error[worst]):.3g} exceeds the bound {float(limits[worst]):.3g}; "
        f"{int(wrong.sum())} of {wrong.numel()} elements are wrong"
    )
