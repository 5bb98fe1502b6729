"""The loop's body: receive, schedule, launch, read what was drawn, emit.

`EngineCore.step` takes what the server sent and returns what it must hear. It owns no process and no socket: the same
core runs behind ZeroMQ (process.py) and inside a test. On a GPU a step's ids are read in the next call, which launches
the step after it first where it can (lookahead.py).
"""

import itertools
import os
import time
from collections.abc import Sequence as Items
from dataclasses import dataclass

from torch import Tensor

from engine import lookahead
from engine.config import Plan
from engine.flight import Before, Flight, Launcher, Part, draw_of
from engine.messages import (
    Accepted,
    Cancel,
    Done,
    Event,
    Failed,
    FinishReason,
    Inbound,
    PromptLogprobs,
    Stats,
    Submit,
    Token,
)
from engine.precision import PrecisionRefused, window_of
from engine.request import Request, Sequence
from engine.runner import Runner
from engine.sampling import BadLogits, Drawn, Found, Sampler
from engine.scheduler import Scheduler, Slice
from kvcache.manager import KVCacheManager
from kvcache.recent import ReadRule
from kvcache.storage import PageStorage
from kvcache.swap import SwapSpace


@dataclass(frozen=True)
class Parts:
    """What a core is made of."""

    plan: Plan
    runner: Runner
    storage: PageStorage
    manager: KVCacheManager
    sampler: Sampler
    vocab_size: int
    eos_token_ids: tuple[int, ...]


class EngineCore:
    """Requests in, events out. Single-threaded: every method belongs to the thread that steps."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._manager = parts.manager
        self._swap = SwapSpace(parts.plan.swap_bytes, parts.manager, parts.storage)
        self._scheduler = Scheduler(parts.manager, parts.plan.max_num_seqs, parts.plan.max_batch_tokens, self._swap)
        window, page_size = parts.storage.layout.policy.window, parts.plan.page_size
        self._launcher = Launcher(parts.runner, parts.sampler, page_size, window, parts.eos_token_ids)
        self._live: dict[str, list[Sequence]] = {}  # unfinished choices of each request
        self._flight: Flight | None = None  # the step that was launched last, if its ids have not been read
        self._events: list[Event] = []
        self._sequence_ids = itertools.count()
        self._orders = itertools.count()
        self._num_steps = 0
        self._num_rows = 0
        self._step_seconds = 0.0

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def step(self, inbox: Items[Inbound]) -> list[Event]:
        """Take in messages, launch one batch, and return the events of the one before; on a CPU, which has computed
        the batch by then, its own."""
        started = time.monotonic()
        has_newcomers = any(isinstance(message, Submit) for message in inbox)
        before, self._flight = self._flight, None  # taken first: whatever fails now, the next call goes on without it
        ahead = self._launch_ahead(before, has_newcomers)
        self._retire(before)
        self._receive(inbox)
        flight = self._launch(self._scheduler.schedule()) if ahead is None else self._settle(ahead)
        if flight is None or flight.is_apart:
            self._flight = flight
        else:
            self._retire(flight)
        self._step_seconds += time.monotonic() - started
        if not self.has_work:
            self.check_integrity()
        events, self._events = self._events, []
        return events

    def stats(self) -> Stats:
        recent = self._manager.recent_occupancy
        return Stats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            pages_used=self._manager.num_used,
            pages_cached=self._manager.num_cached,
            pages_total=self._manager.num_pages,
            tokens_held=self._manager.num_tokens_held,
            recent_pages_used=recent.num_used,
            recent_pages_cached=recent.num_cached,
            recent_pages_total=recent.num_pages,
            recent_tokens_held=recent.num_tokens,
            prefix_queries_total=self._manager.num_queried_tokens,
            prefix_hits_total=self._manager.num_hit_tokens,
            prefix_cut_total=self._manager.num_cut_tokens,
            preemptions_total=self._scheduler.num_preemptions,
            swap_bytes_used=self._swap.num_used_bytes,
            swaps_out_total=self._swap.num_out,
            swaps_in_total=self._swap.num_in,
            swap_bytes_out_total=self._swap.num_bytes_out,
            swap_bytes_in_total=self._swap.num_bytes_in,
            steps_total=self._num_steps,
            batch_tokens_total=self._num_rows,
            step_seconds_total=self._step_seconds,
        )

    def check_integrity(self) -> None:
        """Raise RuntimeError when the page book-keeping contradicts itself."""
        self._scheduler.check_integrity()

    # -- receive ---------------------------------------------------------------------------------------------------

    def _receive(self, inbox: Items[Inbound]) -> None:
        for message in inbox:
            if isinstance(message, Submit):
                self._submit(message)
            elif isinstance(message, Cancel):
                self._cancel(message)

    def _submit(self, submit: Submit) -> None:
        reason = self._why_not(submit)
        if reason is not None:
            self._events.append(reason)
            return
        layout, limit = self.parts.storage.layout, self.parts.plan.kv_request_window
        try:
            window = window_of(submit.kv_policy, len(submit.prompt) + submit.sampling.max_tokens, layout, limit)
        except PrecisionRefused as refusal:
            self._events.append(Failed(submit.id, "invalid", f"kv_policy: {refusal}", "kv_policy"))
            return
        seed = submit.sampling.seed
        if seed is None:
            seed = int.from_bytes(os.urandom(8), "little")
        request = Request(submit, next(self._orders), seed, self._rule(window, len(submit.prompt)))
        if submit.kv_policy is not None:
            self._events.append(Accepted(submit.id))
        leader = self._new_sequence(request, 0)
        leader.num_waiting_forks = submit.n - 1
        self._live[submit.id] = [leader]
        self._scheduler.add(leader)

    def _rule(self, window: int | None, num_prompt: int) -> ReadRule | None:
        """What a request reads in high precision; None: what the cache's policy says."""
        is_exact = self.parts.plan.kv_prefill == "exact"
        if window is None and not is_exact:
            return None
        return self.parts.storage.layout.rule_of(window, num_prompt if is_exact else 0)

    def _cancel(self, cancel: Cancel) -> None:
        for sequence in list(self._live.get(cancel.id, ())):
            if cancel.index is None or (cancel.index == sequence.index and sequence.num_generated > 0):
                self._finish(sequence, "cancelled")

    def _why_not(self, submit: Submit) -> Failed | None:
        """Admission: whether this request can ever be served, decided before it takes anything."""
        plan, sampling = self.parts.plan, submit.sampling
        total = len(submit.prompt) + sampling.max_tokens
        if submit.id in self._live:
            return Failed(submit.id, "invalid", f"request id {submit.id!r} is in use")
        if not submit.prompt:
            return Failed(submit.id, "invalid", "the prompt has no tokens")
        vocab_size = self.parts.vocab_size
        outside = [
            t for t in (*submit.prompt, *sampling.logit_bias, *sampling.stop_token_ids) if not 0 <= t < vocab_size
        ]
        if outside:
            return Failed(submit.id, "invalid", f"token id {outside[0]} is outside the vocabulary of {vocab_size}")
        if submit.n < 1:
            return Failed(submit.id, "invalid", f"n must be at least 1, found {submit.n}")
        if total > plan.max_model_len:
            return Failed(
                submit.id,
                "capacity",
                f"{len(submit.prompt)} prompt tokens and {sampling.max_tokens} to generate exceed the "
                f"{plan.max_model_len} tokens that one request may take",
            )
        return None

    def _new_sequence(self, request: Request, index: int) -> Sequence:
        return Sequence(next(self._sequence_ids), request, index, list(request.submit.prompt))

    # -- run -------------------------------------------------------------------------------------------------------

    def _launch_ahead(self, before: Flight | None, has_newcomers: bool) -> Flight | None:
        """The step after `before`, whose ids nobody has read, if they do not decide what it is."""
        following = lookahead.following(before, self._scheduler, has_newcomers)
        return None if following is None else self._launch(*following)

    def _launch(self, slices: Items[Slice], before: Before | None = None) -> Flight | None:
        """Run a step; None: there is nothing to run. One that is ahead is accounted for when it is settled."""
        if not slices:
            return None
        now = time.monotonic()
        for item in slices:
            if item.sequence.admitted_at is None:
                item.sequence.admitted_at = now
        flight = self._launcher.launch(slices, before)
        if before is None:
            for item in slices:
                self._store(item)
        self._num_steps += 1
        self._num_rows += sum(item.num_tokens for item in slices)
        return flight

    def _store(self, item: Slice) -> None:
        """Account for what a step stores: whatever reads it is launched later, and so runs later."""
        sequence = item.sequence
        sequence.num_computed = item.start + item.num_tokens
        self._manager.commit(sequence.id, sequence.tokens, sequence.num_computed)

    def _retire(self, flight: Flight | None) -> None:
        """Wait for a step, and do what its ids say."""
        if flight is None:
            return
        found = flight.pending.read()
        for part in flight.parts:
            if part.sequence.finished is None:  # else a sibling's failure a moment ago ended it too
                self._collect_prompt_logprobs(part, flight, found)
                if part.draws:
                    drawn = found.drawn[part.draws.start : part.draws.stop]
                    part.sequence.is_left_to_cpu = flight.is_apart and None in drawn
                    self._complete(part.sequence, flight.logits[part.rows[-1]], drawn)

    def _settle(self, ahead: Flight) -> Flight | None:
        """What is left of a step that was launched before the ids of the one before it were read, and messages."""
        flight = ahead.settled()
        for part in () if flight is None else flight.parts:
            self._store(part.item)
        return flight

    def _collect_prompt_logprobs(self, part: Part, flight: Flight, found: Found) -> None:
        for i in part.targets:
            target, entry = flight.pending.targets[i], found.scored[i]
            if entry is None:
                row = flight.logits[target.row].cpu()
                entry = self.parts.sampler.logprobs_of(row, target.token, target.num_top)
            part.sequence.request.prompt_logprobs.append(entry)

    def _complete(self, sequence: Sequence, logits: Tensor, drawn: Items[Drawn | None]) -> None:
        """A sequence is caught up: fork its siblings off if it has just finished the prompt, then sample.

        logits: [vocab], which only choices that have not been drawn look at; drawn: by choice, as `sequence.indices`.
        """
        if sequence.wants_prompt_logprobs:
            self._events.append(PromptLogprobs(sequence.request.submit.id, sequence.request.prompt_logprobs))
        found = dict(zip(sequence.indices, drawn, strict=True))
        if None in drawn:
            logits = logits.cpu()
        for member in [sequence, *self._fork(sequence)]:
            if member.finished is None:  # a failure of one choice ends them all
                self._sample(member, logits, found[member.index])

    def _fork(self, leader: Sequence) -> list[Sequence]:
        """Start the other choices on the leader's pages. Those without room wait, and find the prompt in the index."""
        running: list[Sequence] = []
        for index in range(1, leader.num_waiting_forks + 1):
            child = self._new_sequence(leader.request, index)
            self._live[leader.request.submit.id].append(child)
            copies = self._manager.fork(leader.id, child.id)
            if copies is None or not self._scheduler.adopt(child):
                self._manager.release(child.id)
                self._scheduler.add(child)
                continue
            self.parts.storage.copy(copies)
            child.num_computed, child.num_cached_tokens = leader.num_computed, leader.num_computed
            child.admitted_at = leader.admitted_at
            running.append(child)
        leader.num_waiting_forks = 0
        return running

    # -- sample ----------------------------------------------------------------------------------------------------

    def _sample(self, sequence: Sequence, logits: Tensor, drawn: Drawn | None) -> None:
        """Draw one token, unless it has been, and emit it, or end the choice.  logits: [vocab]."""
        request, sampling = sequence.request, sequence.request.submit.sampling
        if sequence.num_generated >= sampling.max_tokens:  # max_tokens 0: the prompt was all that was wanted
            self._finish(sequence, "length")
            return
        try:
            if drawn is None:
                drawn = self.parts.sampler.sample(logits, draw_of(sequence, sequence.index, self.parts.eos_token_ids))
        except BadLogits as error:
            self._fail(request, str(error))
            return
        token = drawn.token
        if sequence.first_token_at is None:
            sequence.first_token_at = time.monotonic()
        sequence.tokens.append(token)
        self._events.append(Token(request.submit.id, sequence.index, token, drawn.logprobs))
        if token in sampling.stop_token_ids or (token in self.parts.eos_token_ids and not sampling.ignore_eos):
            self._finish(sequence, "stop", token)
        elif sequence.num_generated >= sampling.max_tokens:
            self._finish(sequence, "length")

    # -- end -------------------------------------------------------------------------------------------------------

    def _finish(self, sequence: Sequence, reason: FinishReason, stop_token: int | None = None) -> None:
        """Release a choice's pages and say that it ended; forks that never started end with their leader."""
        now = time.monotonic()
        submit = sequence.request.submit
        admitted = sequence.admitted_at or now
        first_token = sequence.first_token_at or now
        for index in sequence.indices:
            self._events.append(
                Done(
                    submit.id,
                    index,
                    reason,
                    stop_token=stop_token,
                    num_cached_tokens=sequence.num_cached_tokens,
                    num_preemptions=sequence.num_preemptions,
                    queued_s=admitted - submit.arrival,
                    prefill_s=first_token - admitted,
                    decode_s=now - first_token,
                )
            )
        self._drop(sequence, reason)

    def _fail(self, request: Request, message: str) -> None:
        """End a whole request with an error."""
        for sequence in list(self._live[request.submit.id]):
            self._drop(sequence, "cancelled")
        self._events.append(Failed(request.submit.id, "engine", message))

    def _drop(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finished = reason
        self._scheduler.remove(sequence)
        siblings = self._live[sequence.request.submit.id]
        siblings.remove(sequence)
        if not siblings:
            del self._live[sequence.request.submit.id]
