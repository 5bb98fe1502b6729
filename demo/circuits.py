"""A starting point that already looks back: previous-token heads, then heads that match by what came before.

Training from random weights spends most of a small budget before attention learns to copy. The first two layers start
as the circuit that such training ends with. In layer 0, head h attends to the token h + 1 positions back and writes it
into a subspace of its own. In layer 1, every head compares its own last four tokens with the four before each earlier
position, and copies the token found there. All of it stays trainable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from demo.model import Attention, DemoModel, ModelConfig

LOCAL_PAIRS = 4  # rotary pairs, of the highest frequencies, that find a position by its offset
SPREAD = 0.1  # spectral norm of the projections back into the residual stream


def semi_orthogonal(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """Random [rows, cols] whose shorter side is orthonormal."""
    q, _ = torch.linalg.qr(torch.randn(max(rows, cols), min(rows, cols), generator=generator))
    out: Tensor = q if rows >= cols else q.T
    return out


def slow_channels(config: ModelConfig) -> Tensor:
    """Channels of a head that turn by less than one radian over the whole context: they compare content."""
    half = config.head_dim // 2
    pairs = torch.arange(half)
    slow = config.rope_theta ** (-pairs / half) * config.max_position_embeddings < 1.0
    return torch.cat([pairs[slow], pairs[slow] + half])


def offset_query(config: ModelConfig, offset: int) -> Tensor:
    """The query [head_dim] that agrees with `offset_query(config, 0)` as a key that lies `offset` tokens back."""
    half = config.head_dim // 2
    angles = offset * config.rope_theta ** (-torch.arange(LOCAL_PAIRS) / half)
    query = torch.zeros(config.head_dim)
    query[:LOCAL_PAIRS] = torch.cos(angles)
    query[half : half + LOCAL_PAIRS] = -torch.sin(angles)
    return query


@torch.no_grad()
def plant(model: DemoModel, seed: int) -> None:
    """Write both circuits into a freshly initialised model."""
    g = torch.Generator().manual_seed(seed)
    config, trunk = model.config, model.model
    hidden, dim, heads = config.hidden_size, config.head_dim, config.num_attention_heads
    common = semi_orthogonal(1, hidden, g)[0]  # a direction that every embedding shares
    trunk.embed_tokens.weight.add_(0.8 * common)
    first, second = model.attention(0), model.attention(1)
    read = semi_orthogonal(dim, hidden, g)
    read = read - torch.outer(read @ common, common)
    places = [semi_orthogonal(hidden, dim, g) for _ in range(heads)]  # where head h of layer 0 writes
    for head in range(heads):
        own = slice(head * dim, (head + 1) * dim)
        first.q_proj.weight[own] = torch.outer(offset_query(config, head + 1), common)
        first.o_proj.weight[:, own] = SPREAD * places[head]
    for head in range(config.num_key_value_heads):
        own = slice(head * dim, (head + 1) * dim)
        first.k_proj.weight[own] = torch.outer(offset_query(config, 0), common)
        first.v_proj.weight[own] = read
    first.q_norm.weight.fill_(2.0)
    first.k_norm.weight.fill_(2.0)
    match(second, config, [read, *[place.T for place in places]], g)


def match(attention: Attention, config: ModelConfig, features: list[Tensor], g: torch.Generator) -> None:
    """Queries from features 0..3, keys from features 1..4 (one token further back), values and outputs a copy."""
    slow, dim = slow_channels(config), config.head_dim
    groups = config.num_attention_heads // config.num_key_value_heads
    for kv in range(config.num_key_value_heads):
        mixers = [semi_orthogonal(len(slow), dim, g) for _ in features[1:]]
        key = sum((m @ f for m, f in zip(mixers, features[1:], strict=True)), torch.zeros(()))
        query = sum((m @ f for m, f in zip(mixers, features[:-1], strict=True)), torch.zeros(()))
        copy = semi_orthogonal(dim, config.hidden_size, g)
        own = slice(kv * dim, (kv + 1) * dim)
        attention.k_proj.weight[own] = 0.0
        attention.k_proj.weight[kv * dim + slow] = key
        attention.v_proj.weight[own] = copy
        for head in range(kv * groups, (kv + 1) * groups):
            at = slice(head * dim, (head + 1) * dim)
            attention.q_proj.weight[at] = 0.0
            attention.q_proj.weight[head * dim + slow] = query
            attention.o_proj.weight[:, at] = 6 * SPREAD * copy.T
    attention.q_norm.weight.fill_(3.0)
    attention.k_norm.weight.fill_(3.0)
