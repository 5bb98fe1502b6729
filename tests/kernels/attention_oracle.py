"""What tests of attention share: attention in float64 with a bound on a float32 computation of it, and random rows."""

import math

import torch
from torch import Tensor

from tests.tolerance import EPS, dot_bound


def exact_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, num_parts: int = 1) -> tuple[Tensor, Tensor]:
    """torch's attention in float64 and a bound on a float32 computation of it in `num_parts` parts of the context.

    q: [rows, heads, D], the last rows of the sequence; k, v: [n, kv_heads, D] -> result and bound, q's shape.

    A score is a dot product of D terms, off by at most dot_bound, and rounded again when scaled and when the row's
    maximum is taken off. A weight exp(s) is off relatively by its score's error and a few roundings, as many again for
    each part it is merged with, its normalized value by at most twice the row's worst; the weighted sum of values is a
    dot product again.
    """
    group = q.shape[1] // k.shape[1]
    num_keys, first = k.shape[0], k.shape[0] - q.shape[0]
    heads_q = q.double().transpose(0, 1)  # [heads, rows, D]
    heads_k, heads_v = (t.double().repeat_interleave(group, dim=1).transpose(0, 1) for t in (k, v))  # [heads, n, D]
    visible = torch.arange(num_keys) <= torch.arange(first, num_keys)[:, None]  # [rows, n]
    exact = torch.nn.functional.scaled_dot_product_attention(
        heads_q[None], heads_k[None], heads_v[None], attn_mask=visible, scale=scale
    )[0]
    bounds = []
    for head_q, head_k, head_v in zip(heads_q, heads_k, heads_v, strict=True):
        scores = scale * head_q @ head_k.T  # [rows, n]
        weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
        score_error = scale * dot_bound(head_q, head_k) + 2 * EPS * scores.abs()
        worst = score_error.masked_fill(~visible, 0).amax(-1, keepdim=True) + 4 * num_parts * EPS  # [rows, 1]
        bounds.append(2 * worst * (weights @ head_v.abs()) + dot_bound(weights, head_v.T))
    return exact.transpose(0, 1), torch.stack(bounds).transpose(0, 1)


def random_tokens(num_tokens: int, heads: int, head_dim: int, seed: int) -> Tensor:
    """[num_tokens, heads, head_dim] float32, normal."""
    return torch.randn(num_tokens, heads, head_dim, generator=torch.Generator().manual_seed(seed))
