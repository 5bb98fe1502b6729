"""How far a quantized cache moves what attention gives: the measure that calibration lowers.

For rows i of one kv head under the read rule (position j is read quantized iff j >= S and i - j >= W)

    error = sum_i |o'_i - o_i|^2,   size = sum_i |o_i|^2     over all its query heads, before the output projection

Some rows are drawn, not all: keys and values are all there, so that a row has its whole history.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.calibration.record import Recorded

NUM_ROWS = 128  # of each text


@dataclass(frozen=True)
class Head:
    """One kv head in one text, and what its query heads make of it in floating point."""

    queries: Tensor  # [G * num_rows, D], scaled
    keys: Tensor  # [num_tokens, D]
    values: Tensor  # [num_tokens, D]
    seen: Tensor  # [G * num_rows, num_tokens] bool
    quantized: Tensor  # likewise: read from a packed page
    weights: Tensor  # [G * num_rows, num_tokens], softmax
    output: Tensor  # [G * num_rows, D]

    @property
    def size(self) -> float:
        return float(self.output.square().sum())

    def error(self, keys: Tensor | None, values: Tensor | None) -> float:
        """With these keys and values, [num_tokens, D], where packed pages are read; None: as they are."""
        weights = self.weights
        if keys is not None:
            scores = torch.where(self.quantized, self.queries @ keys.T, self.queries @ self.keys.T)
            weights = scores.masked_fill(~self.seen, -torch.inf).softmax(-1)
        output = weights @ self.values
        if values is not None:
            output += weights.masked_fill(~self.quantized, 0) @ (values - self.values)
        return float((output - self.output).square().sum())


def heads_of(text: Recorded, window: int, num_sinks: int, generator: torch.Generator) -> list[Head]:
    """Every kv head of one text, with NUM_ROWS rows of those that read anything quantized."""
    num_tokens, num_kv_heads, head_dim = text.keys.shape
    first = window + num_sinks
    rows = torch.randperm(num_tokens - first, generator=generator)[:NUM_ROWS] + first
    group = text.queries.shape[1] // num_kv_heads
    distance = (rows[:, None] - torch.arange(num_tokens)).repeat(group, 1)
    seen = distance >= 0
    quantized = (distance >= window) & seen & (torch.arange(num_tokens) >= num_sinks)
    queries = text.queries[rows].view(len(rows), num_kv_heads, group, head_dim) * head_dim**-0.5
    heads = []
    for i in range(num_kv_heads):
        q = queries[:, i].transpose(0, 1).flatten(0, 1)
        keys, values = text.keys[:, i].contiguous(), text.values[:, i].contiguous()
        weights = (q @ keys.T).masked_fill(~seen, -torch.inf).softmax(-1)
        heads.append(Head(q, keys, values, seen, quantized, weights, weights @ values))
    return heads
