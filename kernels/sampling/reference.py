"""The definition of what is computed from one row of logits."""

import math

import torch
from torch import Tensor

from kernels.contract import Filters, RowSpec

LOWEST = -700.0  # exponents below give 0: e^-709 is where float64 begins to lose digits


class SamplingReference:
    """Probabilities are w[i] / sum w,  w[i] = exp((logit[i] - max logit) / temperature), in float64; 0 below e^-700.

    In the order of falling logits, ties by rising id, a candidate stays while

        its rank < top_k,   the mass before it < top_p * (the mass that top_k left),   its w >= min_p * the first's w

    and the first always does. A draw inverts the cumulative sum: over the candidates in that order, or over all ids in
    their own order where no filter is set. Sorting is what takes the time: 8 operations and 12 bytes an id without it.
    """

    name = "reference"

    def refuses(self, spec: RowSpec) -> str | None:
        return None

    def argmax(self, logits: Tensor) -> int | None:
        """logits: [vocab] float32. None when one is NaN or the largest is not finite."""
        largest = logits.max()  # NaN propagates; -inf alone means that nothing can be chosen
        return int((logits == largest).nonzero()[0]) if math.isfinite(float(largest)) else None

    def draw(self, logits: Tensor, filters: Filters, uniform: float) -> int:
        """logits: [vocab] float32; the largest must be finite, none NaN."""
        scaled = (logits.double() - logits.max()) / filters.temperature  # at most 0, however small the temperature
        weights = torch.where(scaled < LOWEST, 0.0, scaled.exp())  # [vocab]
        if filters.top_k <= 0 and filters.top_p >= 1 and filters.min_p <= 0:
            return _invert(weights, uniform)
        ids = logits.sort(descending=True, stable=True).indices  # [vocab]
        weights = weights[ids]
        if filters.top_k > 0:
            weights = weights[: filters.top_k]
        keep = weights >= filters.min_p * weights[0]
        if filters.top_p < 1:
            keep &= weights.cumsum(0) - weights < filters.top_p * weights.sum()
            keep[0] = True
        return int(ids[_invert(weights * keep, uniform)])

    def log_probs(self, logits: Tensor, token: int, num_top: int) -> tuple[float, list[tuple[int, float]]]:
        """logits: [vocab] float32."""
        scores = torch.log_softmax(logits.double(), dim=-1)
        if num_top == 0:
            return float(scores[token]), []
        ids = logits.sort(descending=True, stable=True).indices[:num_top]
        return float(scores[token]), list(zip(ids.tolist(), scores[ids].tolist(), strict=True))


def _invert(weights: Tensor, uniform: float) -> int:
    """The first index whose cumulative weight exceeds `uniform` of the whole.  weights: [num_candidates] float64."""
    cumulative = weights.cumsum(0)
    index = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    last = int(weights.nonzero()[-1])  # rounding may push the target past the end
    return min(index, last)
