"""Logits to ids. Every row is drawn by itself, so a request's tokens do not depend on its neighbours.

Logits that lie on a GPU are drawn from there, a step's rows at once, and the host need not wait for what is drawn; only
rows that the kernels leave come to the CPU.

Order of the rules: bias, penalties, min_tokens, temperature, then min_p, top_k and top_p, then one draw. The draw takes
one uniform number that is a pure function of (seed, choice, position): replaying a request replays its tokens, whatever
ran beside it and however often it was preempted.
"""

import math
import struct
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

import kernels.sampling
from engine.messages import Logprobs, Sampling
from kernels.contract import (
    Choice,
    Edits,
    Filters,
    KernelRefused,
    Last,
    RowDraw,
    RowSpec,
    SamplingKernel,
    Scores,
    StepSamplingKernel,
    select,
)
from kernels.transfer import Fetch, send


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
    last: int | None = None  # of the token after these, which nobody knows yet: its place in the step that draws it

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt + (self.last is not None)

    @property
    def has_penalties(self) -> bool:
        s = self.sampling
        return s.presence_penalty != 0 or s.frequency_penalty != 0 or s.repetition_penalty != 1

    @property
    def banned(self) -> tuple[int, ...]:
        """The endings that min_tokens still forbid; an id may be there twice."""
        s = self.sampling
        if self.num_generated >= s.min_tokens:
            return ()
        return (*s.stop_token_ids, *(() if s.ignore_eos else self.eos_token_ids))

    def edited(self, logits: Tensor) -> Tensor:
        """The row after bias, penalties and bans, with the same bits as `edits` give; itself where there are none.

        logits: [vocab] float32 on the CPU, left as it is. Rule by rule: their ids need not be joined.
        """
        s, banned = self.sampling, self.banned
        if not (s.logit_bias or banned or self.has_penalties):
            return logits
        logits = logits.clone()
        if s.logit_bias:
            added = torch.tensor(list(s.logit_bias.values()), dtype=torch.float32)
            logits.index_add_(0, _tensor(list(s.logit_bias)), added)
        if s.repetition_penalty != 1:
            seen = _tensor(list(set(self.tokens)))
            values = logits.index_select(0, seen)
            scaled = torch.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
            logits.index_copy_(0, seen, scaled)
        if s.presence_penalty or s.frequency_penalty:
            counts = self._counts()
            logits.index_add_(0, _tensor(list(counts)), self._less(_tensor(list(counts.values()))), alpha=-1)
        if banned:
            logits.index_fill_(0, _tensor(banned), -math.inf)
        return logits

    def edits(self) -> Edits | None:
        """The same for a kernel; None: nothing is edited."""
        s, banned = self.sampling, set(self.banned)
        if not (s.logit_bias or banned or self.has_penalties):
            return None
        counts, seen = self._counts(), set(self.tokens) if s.repetition_penalty != 1 else set()
        # First the ids that a rule names, what is banned at the end: these are looked up one by one. The others share
        # columns: one by one, 1,373 of them took 1.6 ms in place of 0.2.
        named = [*s.logit_bias.keys() - banned, *banned]
        times = [*(counts.pop(i, 0) for i in named), *counts.values()]
        ids = _tensor([*named, *counts, *seen.difference(named, counts)])
        terms, counted = torch.zeros(3, len(ids)), torch.zeros(len(ids))
        add, factor, less = terms.unbind()
        factor.fill_(s.repetition_penalty)
        if any(times):
            counted[: len(times)] = _tensor(times)
            less.copy_(torch.where(counted > 0, self._less(counted), 0.0))
        if s.logit_bias:
            add[: len(named)] = torch.tensor([s.logit_bias.get(i, 0) for i in named], dtype=torch.float32)
        if named and seen:
            factor[: len(named)] = torch.tensor([s.repetition_penalty if i in seen else 1 for i in named])
        if banned:
            less[len(named) - len(banned) : len(named)] = math.inf
        rules = s.repetition_penalty, s.presence_penalty, s.frequency_penalty
        last = None if self.last is None or not self.has_penalties else Last(self.last, *rules)
        return Edits(ids, terms, counted, last) if len(ids) or last is not None else None

    def _counts(self) -> Counter[int]:
        """How often each id is in the answer; empty where no penalty asks."""
        s = self.sampling
        return Counter(self.tokens[self.num_prompt :] if s.presence_penalty or s.frequency_penalty else ())

    def _less(self, counts: Tensor) -> Tensor:
        """counts: [n], how often each is in the answer -> [n] float32, what its logit loses."""
        return self.sampling.presence_penalty + self.sampling.frequency_penalty * counts

    @property
    def filters(self) -> Filters | None:
        """None is greedy."""
        s = self.sampling
        return None if s.temperature == 0 else Filters(s.temperature, s.top_k, s.top_p, s.min_p)

    @property
    def uniform(self) -> float:
        return uniform_at(self.seed, self.index, self.num_generated)

    def of_row(self, row: int) -> RowDraw:
        """The same for a kernel."""
        filters = self.filters
        return RowDraw(row, filters, 0.0 if filters is None else self.uniform, self.edits())


@dataclass(frozen=True)
class Drawn:
    """One token, and its log-probabilities if they were asked for."""

    token: int
    logprobs: Logprobs | None = None


@dataclass(frozen=True)
class Target:
    """One token of a prompt to score."""

    row: int  # of the step's logits
    token: int
    num_top: int  # most likely ids to name


@dataclass(frozen=True)
class Found:
    """What a step drew and scored; None is left to `sample` and `logprobs_of`."""

    drawn: Sequence[Drawn | None]
    scored: Sequence[Logprobs | None]  # targets


@dataclass(frozen=True)
class Pending:
    """What a step draws and scores where its logits are: asked for, perhaps not computed yet."""

    draws: Sequence[Draw]
    targets: Sequence[Target]
    ids: Tensor | None  # [num_draws] int32 on the device, -1 for what is left to the CPU; None: all is
    fetch: Fetch | None  # ids, then the scores of draws that want some, and those of targets

    def read(self) -> Found:
        """Wait for it."""
        drawn: list[Drawn | None] = [None] * len(self.draws)
        if self.fetch is None:
            return Found(drawn, [None] * len(self.targets))
        ids, *scores = self.fetch.wait()
        for i, token in enumerate(ids.tolist()):
            drawn[i] = None if token < 0 else Drawn(token)
        if wanted := _wanting(self.draws):
            num_top = [self.draws[i].sampling.num_logprobs or 0 for i in wanted]
            for i, entry in zip(wanted, _entries(scores[0], scores[1], num_top), strict=True):
                drawn[i] = None if entry is None else Drawn(entry.token, entry)
        scored = _entries(scores[-2], scores[-1], [target.num_top for target in self.targets]) if self.targets else []
        return Found(drawn, scored)


@dataclass(frozen=True)
class Sampler:
    """The rules, on the kernels that were chosen at load."""

    kernel: SamplingKernel  # of one row on the CPU
    on_gpu: StepSamplingKernel | None = None
    bring: Callable[[Sequence[Tensor]], Fetch] = Fetch  # results of on_gpu to the host

    def prepare(self, vocab_size: int, device: torch.device) -> None:
        """Compile what a step may need, so that no request waits for it."""
        if self.on_gpu is not None:
            edits = Edits(torch.zeros(1, dtype=torch.int64), torch.ones(3, 1), torch.zeros(1))
            draws = [RowDraw(0, None), RowDraw(0, Filters(1.0, top_k=1)), RowDraw(0, None, edits=edits)]
            logits = torch.zeros(1, vocab_size, device=device)
            self.on_gpu.score_all(logits, [(0, 0)], self.on_gpu.draw_all(logits, draws), 1)

    def launch(
        self,
        logits: Tensor,
        draws: Sequence[tuple[int, Draw]],
        targets: Sequence[Target] = (),
        before: Tensor | None = None,
    ) -> Pending:
        """Draw and score what can be drawn and scored where the logits are, each from a row of them. Waits for nothing;
        who reads what is pending waits for the step, also where nothing is drawn in it.

        logits: [num_logits, vocab] float32. before: the ids of the step before, where a draw has a `last`.
        """
        wishes = [draw for _, draw in draws]
        if self.on_gpu is None:
            return Pending(wishes, targets, None, None)
        ids = self.on_gpu.draw_all(logits, [draw.of_row(row) for row, draw in draws], before)  # [num_draws]
        results = [ids]
        if wanted := _wanting(wishes):
            num_top = max(wishes[i].sampling.num_logprobs or 0 for i in wanted)
            results += _tensors(self.on_gpu.score_all(logits, [(draws[i][0], i) for i in wanted], ids, num_top))
        if targets:
            (tokens,) = send([torch.tensor([target.token for target in targets])], logits.device).tensors
            pairs = [(target.row, i) for i, target in enumerate(targets)]
            results += _tensors(self.on_gpu.score_all(logits, pairs, tokens, max(t.num_top for t in targets)))
        return Pending(wishes, targets, ids, self.bring(results))

    def choose(self, logits: Tensor, draw: Draw) -> int:
        """Choose one token id.  logits: [vocab] float32 on the CPU. Raises BadLogits."""
        best = self.kernel.argmax(logits)
        if best is None:
            raise BadLogits("the model produced logits that are not finite")
        edited, filters = draw.edited(logits), draw.filters
        if edited is not logits:
            best = self.kernel.argmax(edited)
            if best is None:
                raise BadLogits("bias, penalties and min_tokens leave no logit that is finite")
        return best if filters is None else self.kernel.draw(edited, filters, draw.uniform)

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


def _wanting(draws: Sequence[Draw]) -> list[int]:
    """Which draws want log-probabilities."""
    return [i for i, draw in enumerate(draws) if draw.sampling.num_logprobs is not None]


def _tensors(scores: Scores) -> list[Tensor]:
    return [scores.ids, scores.values]


def _entries(ids: Tensor, values: Tensor, num_top: Sequence[int]) -> list[Logprobs | None]:
    """Scores on the host as they are sent; None where there are none.  ids, values: [n, 1 + most]; num_top: [n]."""
    return [
        None if own[0] < 0 else Logprobs(own[0], scores[0], list(zip(own[1:], scores[1:], strict=True))[:most])
        for own, scores, most in zip(ids.tolist(), values.tolist(), num_top, strict=True)
    ]


def _tensor(numbers: Sequence[int]) -> Tensor:
    """[n] int64; of 1,400 in 21 us, which torch.tensor takes 70 for."""
    return torch.frombuffer(array("q", numbers), dtype=torch.int64) if numbers else torch.empty(0, dtype=torch.int64)


def uniform_at(seed: int, index: int, position: int) -> float:
    """A uniform number in [0, 1) with 53 bits, fixed by its three arguments (seed is taken modulo 2**64)."""
    key = struct.pack("<QII", seed % 2**64, index, position)
    return (int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 11) / 2**53
