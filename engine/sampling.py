"""Logits to ids. Every row is drawn by itself, so a request's tokens do not depend on its neighbours.

Logits that lie on a GPU are drawn from there, a step's rows at once; only rows with rules that no kernel has there come
to the CPU.

Order of the rules: bias, penalties, min_tokens, temperature, then min_p, top_k and top_p, then one draw. The draw takes
one uniform number that is a pure function of (seed, choice, position): replaying a request replays its tokens, whatever
ran beside it and however often it was preempted.
"""

import math
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

import kernels.sampling
from engine.messages import Logprobs, Sampling
from kernels.contract import (
    Choice,
    Filters,
    KernelRefused,
    RowDraw,
    RowSpec,
    SamplingKernel,
    StepSamplingKernel,
    select,
)


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
    def is_plain(self) -> bool:
        """Whether nothing is to be applied to the raw logits before the temperature."""
        s = self.sampling
        return (
            not s.logit_bias
            and s.presence_penalty == s.frequency_penalty == 0
            and s.repetition_penalty == 1
            and self.num_generated >= s.min_tokens
        )

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the largest raw logit wins, nothing else to apply."""
        return self.sampling.temperature == 0 and self.is_plain

    @property
    def filters(self) -> Filters | None:
        """None is greedy."""
        s = self.sampling
        return None if s.temperature == 0 else Filters(s.temperature, s.top_k, s.top_p, s.min_p)

    @property
    def uniform(self) -> float:
        return uniform_at(self.seed, self.index, self.num_generated)


@dataclass(frozen=True)
class Drawn:
    """One token, and its log-probabilities if they were asked for."""

    token: int
    logprobs: Logprobs | None = None


@dataclass(frozen=True)
class Sampler:
    """The rules, on the kernels that were chosen at load."""

    kernel: SamplingKernel  # of one row on the CPU
    on_gpu: StepSamplingKernel | None = None

    def prepare(self, vocab_size: int, device: torch.device) -> None:
        """Compile what a step may need, so that no request waits for it."""
        if self.on_gpu is not None:
            draws = [RowDraw(0, None), RowDraw(0, Filters(1.0, top_k=1))]
            self.on_gpu.draw_all(torch.zeros(1, vocab_size, device=device), draws)

    def choose_on_gpu(self, logits: Tensor, draws: Sequence[tuple[int, Draw]]) -> list[Drawn | None]:
        """What a step draws, each from a row of `logits`; None is for `choose` to choose or to refuse.

        logits: [num_logits, vocab] float32. Waits for the GPU once, for 4 bytes a draw, and once more where
        log-probabilities are wanted.
        """
        found: list[Drawn | None] = [None] * len(draws)
        able = [i for i, (_, draw) in enumerate(draws) if draw.is_plain]
        if self.on_gpu is None or not able:
            return found
        asked = [RowDraw(row, draw.filters, draw.uniform) for row, draw in (draws[i] for i in able)]
        tokens = self.on_gpu.draw_all(logits, asked).tolist()
        scored: list[tuple[int, int, int]] = []  # draw, token, most likely ids to name
        for i, token in zip(able, tokens, strict=True):
            num_top = draws[i][1].sampling.num_logprobs
            if token >= 0 and num_top is None:
                found[i] = Drawn(token)
            elif token >= 0 and num_top is not None:
                scored.append((i, token, num_top))
        if scored:
            rows, most = [draws[i][0] for i, _, _ in scored], max(num_top for _, _, num_top in scored)
            scores = self.on_gpu.log_probs_all(logits, rows, [token for _, token, _ in scored], most)
            for (i, token, num_top), score in zip(scored, scores, strict=True):
                found[i] = None if score is None else Drawn(token, Logprobs(token, score[0], score[1][:num_top]))
        return found

    def choose(self, logits: Tensor, draw: Draw) -> int:
        """Choose one token id.  logits: [vocab] float32 on the CPU. Raises BadLogits."""
        best = self.kernel.argmax(logits)
        if best is None:
            raise BadLogits("the model produced logits that are not finite")
        if draw.is_plain_greedy:
            return best
        logits = _adjust(logits.clone(), draw)
        best = self.kernel.argmax(logits)
        if best is None:
            raise BadLogits("bias, penalties and min_tokens leave no logit that is finite")
        filters = draw.filters
        return best if filters is None else self.kernel.draw(logits, filters, draw.uniform)

    def sample(self, logits: Tensor, draw: Draw) -> Drawn:
        """Choose, with log-probabilities if they are wanted.  logits: [vocab] likewise. Raises BadLogits."""
        token, num_top = self.choose(logits, draw), draw.sampling.num_logprobs
        return Drawn(token, None if num_top is None else self.logprobs_of(logits, token, num_top))

    def logprobs_of(self, logits: Tensor, token: int, num_top: int) -> Logprobs:
        """The raw model's log-probability of `token` and of the `num_top` most likely.  logits: [vocab] likewise."""
        return Logprobs(token, *self.kernel.log_probs(logits, token, num_top))


def sampler_for(
    vocab_size: int, device: torch.device, insisted: str | None
) -> tuple[Sampler, list[tuple[str, Choice[Any]]]]:
    """The sampler of logits on `device`, and what the start screen says of it: (what, choice).

    insisted: the back end that the user asks for; one that no sampler has binds none. Raises KernelRefused.
    """
    cpu, on_gpu = RowSpec(vocab_size, torch.device("cpu"), torch.float32), kernels.sampling.ON_GPU
    is_of_cpu = any(kernel.name == insisted for kernel in kernels.sampling.KERNELS)
    choice = select(kernels.sampling.KERNELS, cpu, insisted if is_of_cpu else None)
    if device.type == "cpu":
        return Sampler(choice.kernel), [("sampling", choice)]
    reason = f"not the requested {insisted!r}" if is_of_cpu else on_gpu.refuses(replace(cpu, device=device))
    if reason is None:
        return Sampler(choice.kernel, on_gpu), [("sampling", Choice(on_gpu, ())), ("sampling left to the CPU", choice)]
    if insisted == on_gpu.name:
        raise KernelRefused(f"no kernel serves sampling on {device.type}: {on_gpu.name}: {reason}")
    refusals = (f"{on_gpu.name}: {reason}", *choice.refusals)
    return Sampler(choice.kernel), [("sampling", Choice(choice.kernel, refusals))]


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
