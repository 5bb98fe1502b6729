"""Attention kernels between the model and its cache: a history that is dropped, and channels that are scaled."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.attention.f16.layout import keys_of, values_of
from kernels.contract import AttentionInputs

PAIR, CHANNEL = 5, 9  # the rotary pair of keys, and the channel of values, that stand out once scaled


@dataclass(frozen=True)
class Dropping:
    """The control: what a quantized cache reads from packed pages is not read at all.

    out[i] = sum_j softmax_j(scale q[i] . k[j]) v[j]   over j <= i with j < S or i - j < W, over float32 pages
    """

    kernel: Any  # of the float32 cache
    window: int  # W tokens
    num_sinks: int  # S tokens
    name: str = "dropping"

    def refuses(self, spec: object) -> str | None:
        return None

    def store(self, k: Tensor, v: Tensor, pages: Tensor, inputs: AttentionInputs) -> None:
        self.kernel.store(k, v, pages, inputs)

    def attend(self, q: Tensor, pages: Tensor, inputs: AttentionInputs, scale: float) -> Tensor:
        """q: [num_tokens, num_heads, D]"""
        starts, results = inputs.query_starts, []
        for i, length in enumerate(inputs.context_lens):
            rows = q[starts[i] : starts[i + 1]].transpose(0, 1)  # [num_heads, num_rows, D]
            held = pages[inputs.block_tables[i, : -(-length // pages.shape[3])]]
            keys = keys_of(held).permute(1, 0, 3, 2).flatten(1, 2)[:, :length]  # [num_kv_heads, length, D]
            values = values_of(held).transpose(0, 1).flatten(1, 2)[:, :length]
            position = torch.arange(length - rows.shape[1], length)[:, None]
            other = torch.arange(length)
            seen = (other <= position) & ((other < self.num_sinks) | (position - other < self.window))
            group = rows.shape[0] // keys.shape[0]
            scores = rows @ keys.repeat_interleave(group, 0).mT * scale
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            results.append((weights @ values.repeat_interleave(group, 0)).transpose(0, 1))
        return torch.cat(results)


@dataclass(frozen=True)
class Scaling:
    """Outliers that the float model does not notice: keys times `keys` with queries divided by it, and values times
    `values` with outputs divided by it, as if folded into the projections. Powers of two, so that nothing is rounded.
    """

    kernel: Any
    keys: Tensor  # [D]
    values: Tensor  # [D]
    name: str = "scaling"

    def refuses(self, spec: object) -> str | None:
        return None

    def store(self, k: Tensor, v: Tensor, cache: Any, inputs: AttentionInputs) -> None:
        self.kernel.store(k * self.keys, v * self.values, cache, inputs)

    def attend(self, q: Tensor, cache: Any, inputs: AttentionInputs, scale: float) -> Tensor:
        attended: Tensor = self.kernel.attend(q / self.keys, cache, inputs, scale)
        return attended / self.values


def outliers(head_dim: int, factor: float) -> tuple[Tensor, Tensor]:
    """Scales of keys and of values, each [head_dim]: `factor` for one rotary pair of keys and one channel of values."""
    keys, values = torch.ones(head_dim), torch.ones(head_dim)
    half = head_dim // 2
    keys[[PAIR % half, PAIR % half + half]] = factor
    values[CHANNEL % head_dim] = factor
    return keys, values
