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
from kernels.contract import Filters, SamplingKernel


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


@dataclass(frozen=True)
class Sampler:
    """The rules, on the kernel that was chosen at load."""

    kernel: SamplingKernel

    def choose(self, logits: Tensor, draw: Draw) -> int:
        """Choose one token id.  logits: [vocab] float32. Raises BadLogits."""
        best = self.kernel.argmax(logits)
        if best is None:
            raise BadLogits("the model produced logits that are not finite")
        if draw.is_plain_greedy:
            return best
        logits = _adjust(logits.clone(), draw)
        best = self.kernel.argmax(logits)
        if best is None:
            raise BadLogits("bias, penalties and min_tokens leave no logit that is finite")
        s = draw.sampling
        if s.temperature == 0:
            return best
        uniform = uniform_at(draw.seed, draw.index, draw.num_generated)
        return self.kernel.draw(logits, Filters(s.temperature, s.top_k, s.top_p, s.min_p), uniform)

    def logprobs_of(self, logits: Tensor, token: int, num_top: int) -> Logprobs:
        """The raw model's log-probability of `token` and of the `num_top` most likely.  logits: [vocab] float32."""
        return Logprobs(token, *self.kernel.log_probs(logits, token, num_top))


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


def uniform_at(seed: int, index: int, position: int) -> float:
    """A uniform number in [0, 1) with 53 bits, fixed by its three arguments (seed is taken modulo 2**64)."""
    key = struct.pack("<QII", seed % 2**64, index, position)
    return (int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 11) / 2**53
