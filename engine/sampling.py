"""Logits to ids. Every row is drawn by itself, so a request's tokens do not depend on its neighbours.

Order of the rules: bias, penalties, min_tokens, temperature, then min_p, top_k and top_p, then one draw. The draw takes
one uniform number that is a pure function of (seed, choice, position): replaying a request replays its tokens, whatever
ran beside it and however often it was preempted.
"""

import math
import struct
from collections import Counter
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from engine.messages import Logprobs, Sampling

HEAD = 1024  # candidates that top_p and min_p are tried on before the whole vocabulary is sorted


class BadLogits(RuntimeError):
    """The model produced NaN or no finite logit: the checkpoint or a kernel is broken; nothing can be sampled."""


@dataclass(frozen=True)
class Draw:
    """One token to choose."""

    sampling: Sampling
    seed: int
    index: int  # of the choice
    tokens: list[int]  # prompt, then generated
    num_prompt: int
    eos_token_ids: tuple[int, ...]

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the largest raw logit wins, nothing else to apply."""
        s = self.sampling
        return (
            s.temperature == 0
            and not s.logit_bias
            and s.presence_penalty == s.frequency_penalty == 0
            and s.repetition_penalty == 1
            and self.num_generated >= s.min_tokens
        )


def fault_in(sampling: Sampling) -> str | None:
    """What is wrong with the rules, naming the one at fault, or None. NaN is outside of every range."""
    ranges = (
        ("max_tokens", sampling.max_tokens, 0, math.inf),
        ("temperature", sampling.temperature, 0, math.inf),
        ("top_p", sampling.top_p, 0, 1),
        ("min_p", sampling.min_p, 0, 1),
        ("presence_penalty", sampling.presence_penalty, -math.inf, math.inf),
        ("frequency_penalty", sampling.frequency_penalty, -math.inf, math.inf),
        ("repetition_penalty", sampling.repetition_penalty, 1e-6, 1e6),
        ("min_tokens", sampling.min_tokens, 0, math.inf),
    )
    for name, value, lowest, highest in ranges:
        if not lowest <= value <= highest:
            return f"{name} must be from {lowest} to {highest}, found {value}"
    return None


def choose(logits: Tensor, draw: Draw) -> int:
    """Choose one token id.  logits: [vocab] float32. Raises BadLogits."""
    if not math.isfinite(float(logits.max())):  # NaN propagates through max; -inf alone means an empty row
        raise BadLogits("the model produced logits that are not finite")
    if draw.is_plain_greedy:
        return int(logits.argmax())
    logits = _adjust(logits.clone(), draw)
    if draw.sampling.temperature == 0:
        return int(logits.argmax())
    return _draw(logits, draw)


def logprobs_of(logits: Tensor, token: int, num_top: int) -> Logprobs:
    """The raw model's log-probability of `token` and of the `num_top` most likely.  logits: [vocab] float32."""
    scores = torch.log_softmax(logits, dim=-1)
    values, ids = scores.topk(min(num_top, scores.numel()))
    top = list(zip(ids.tolist(), values.tolist(), strict=True))
    return Logprobs(token, float(scores[token]), top)


def _adjust(logits: Tensor, draw: Draw) -> Tensor:
    """Apply bias, penalties and min_tokens in place.  logits: [vocab] float32."""
    s = draw.sampling
    if s.logit_bias:
        logits[torch.tensor(list(s.logit_bias))] += torch.tensor(list(s.logit_bias.values()))
    if s.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(draw.tokens)))
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
    if s.presence_penalty or s.frequency_penalty:
        counts = Counter(draw.tokens[draw.num_prompt :])
        if counts:
            penalty = s.presence_penalty + s.frequency_penalty * torch.tensor(list(counts.values()))
            logits[torch.tensor(list(counts))] -= penalty
    if draw.num_generated < s.min_tokens:
        endings = (*s.stop_token_ids, *(() if s.ignore_eos else draw.eos_token_ids))
        logits[torch.tensor(endings, dtype=torch.long)] = -math.inf
    return logits


def _draw(logits: Tensor, draw: Draw) -> int:
    """Temperature, filters, one draw by inverting the cumulative distribution.  logits: [vocab] float32."""
    s = draw.sampling
    scaled = (logits.double() - logits.max()) / s.temperature  # at most 0, however small the temperature
    probs = torch.softmax(scaled, dim=-1)  # [vocab]; double: the sum of 150,000 terms must not drift
    uniform = uniform_at(draw.seed, draw.index, draw.num_generated)
    if s.top_k <= 0 and s.top_p >= 1 and s.min_p <= 0:
        return _invert(probs, uniform)
    probs, ids = _most_likely(probs, s)
    keep = probs >= s.min_p * probs[0]
    if s.top_p < 1:
        kept = probs / (probs.sum() if s.top_k > 0 else 1.0)  # the mass that top_k left; all of it otherwise
        keep &= kept.cumsum(0) - kept < s.top_p
        keep[0] = True
    return int(ids[_invert(probs * keep, uniform)])


def _most_likely(probs: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The candidates the filters can keep, most likely first, and their ids.  probs: [vocab], sums to 1.

    Without top_k the filters look at the whole vocabulary, but they rarely reach past the head of it: sorting 152,000
    numbers takes 12 ms, taking the first 1,024 of them less than one.
    """
    if 0 < sampling.top_k < probs.numel():
        return probs.topk(sampling.top_k)
    if probs.numel() > HEAD:
        head, ids = probs.topk(HEAD)
        by_mass = sampling.top_p < 1 and float(head.sum()) >= sampling.top_p
        if by_mass or float(head[-1]) < sampling.min_p * float(head[0]):
            return head, ids
    return probs.sort(descending=True, stable=True)


def _invert(probs: Tensor, uniform: float) -> int:
    """The first index whose cumulative probability exceeds `uniform`.  probs: [num_candidates], need not sum to 1."""
    cumulative = probs.cumsum(0)
    index = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    last = int(probs.nonzero()[-1])  # rounding may push the target past the end
    return min(index, last)


def uniform_at(seed: int, index: int, position: int) -> float:
    """A uniform number in [0, 1) with 53 bits, fixed by its three arguments (seed is taken modulo 2**64)."""
    key = struct.pack("<QII", seed % 2**64, index, position)
    return (int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 11) / 2**53
