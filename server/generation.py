"""One request on its way through the engine, as an async context manager.

    async with Generation(service, jobs) as generation:
        async for deltas in generation:      # a list of Delta, at most one for each choice
            ...

Entering admits and submits; leaving cancels whatever still runs. Disconnect, stop string, timeout and error all take
this one way out. Choice c of prompt p has index p * n + c.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

from engine.client import EngineUnavailable, EventStream
from engine.messages import Accepted, Done, Event, Failed, Logprobs, PromptLogprobs, Token
from server.admission import Job
from server.errors import ApiError, EngineFailure, from_exception, from_failed
from server.service import Service, shutting_down
from server.stops import StopScanner
from server.tokenizer import Detokenizer, Tokenizer
from server.tracing import Caller, Fault, Trace

Reason = Literal["stop", "length"]


@dataclass(frozen=True)
class ScoredToken:
    """A token of the answer, its log-probabilities, and where its text begins, in characters."""

    token: int
    logprobs: Logprobs | None
    offset: int


@dataclass(frozen=True)
class Delta:
    """What became known of one choice: text, the tokens it is made of, and its end."""

    index: int
    text: str
    tokens: tuple[ScoredToken, ...]
    finish_reason: Reason | None


class Choice:
    """Tokens of one answer to text: detokenized, searched for stop strings, held back where one may begin."""

    def __init__(self, job: Job, index: int, tokenizer: Tokenizer) -> None:
        self.index = index
        self.num_tokens = 0
        self.finish_reason: Reason | None = None
        self._min_tokens = job.submit.sampling.min_tokens
        self._end_tokens = job.end_tokens
        self._detokenizer = Detokenizer(tokenizer, job.submit.prompt, job.skip_special_tokens)
        self._keep_stop = job.keep_stop
        self._scanner = StopScanner(job.stop, job.keep_stop)
        self._pending: Token | None = None  # may turn out to be the end token, whose text is not shown
        self._num_chars = 0  # detokenized
        self._num_shown = 0
        self._text = ""  # shown, not yet taken
        self._tokens: list[ScoredToken] = []  # not yet taken

    def token(self, event: Token) -> None:
        """Take one more token."""
        self._settle()
        if self.finish_reason is None:
            self.num_tokens += 1
            self._pending = event
            if event.token not in self._end_tokens:
                self._settle()

    def done(self, event: Done) -> None:
        """The engine ended this choice. Raises EngineFailure for an end nobody asked for."""
        if self.finish_reason is not None:
            return
        if event.reason == "cancelled":
            raise EngineFailure("The engine stopped before the answer was complete")
        if event.stop_token is not None and not self._keep_stop:
            self._pending = None
        self._settle()
        if self.finish_reason is None:
            self._scan(self._detokenizer.flush())
        if self.finish_reason is None:
            self._show(self._scanner.flush())
            self.finish_reason = event.reason

    def take(self) -> Delta | None:
        """What became known since the last call; None when that is nothing."""
        ended = self.finish_reason is not None
        if ended and self._scanner.found is None:
            ready = len(self._tokens)
        else:  # a token is out when its text is
            ready = sum(token.offset < self._num_shown for token in self._tokens)
        if not (self._text or ready or ended):
            return None
        delta = Delta(self.index, self._text, tuple(self._tokens[:ready]), self.finish_reason)
        self._text, self._tokens = "", self._tokens[ready:]
        return delta

    def _settle(self) -> None:
        """The pending token is part of the answer after all."""
        event, self._pending = self._pending, None
        if event is not None:
            self._tokens.append(ScoredToken(event.token, event.logprobs, self._num_chars))
            self._scan(self._detokenizer.push(event.token))

    def _scan(self, text: str) -> None:
        self._num_chars += len(text)
        if self.num_tokens < self._min_tokens:
            self._show(text)  # no stop string may end, or begin, here
            return
        self._show(self._scanner.push(text))
        if self._scanner.found is not None:
            self.finish_reason = "stop"

    def _show(self, text: str) -> None:
        self._num_shown += len(text)
        self._text += text


class Generation:
    """The answers to one request. Enter it once; iterate it once."""

    def __init__(self, service: Service, jobs: Sequence[Job], caller: Caller | None = None) -> None:
        """caller: for the trace, if traces are made."""
        self._service = service
        self._jobs = jobs
        self._caller = caller
        self._runs: list[_Run] = []
        self._waiting: dict[asyncio.Future[list[Event]], _Run] = {}
        self._cut_off: asyncio.Task[Any] | None = None  # done when the server cuts answers off
        self._admission = ExitStack()
        self._failure: BaseException | None = None  # which a stream has told its reader, and raised no further

    async def __aenter__(self) -> "Generation":
        """Raises Unavailable, EngineUnavailable, or InvalidRequest for a precision that the engine does not give.

        Nothing is left running then.
        """
        first_index = 0
        try:
            self._admission.enter_context(self._service.admitted(len(self._jobs)))
            for job in self._jobs:
                self._runs.append(_Run(self._service, job, first_index))
                first_index += job.submit.n
            for run in self._runs:
                await run.accepted()
        except BaseException as error:
            if isinstance(error, EngineUnavailable):
                self._service.metrics.refused("unavailable")
            self._leave()
            self._record(error, left=False)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        left = not isinstance(error, ApiError) and any(not run.ended for run in self._runs)
        if left:
            self._service.metrics.refused("disconnected")
        self._leave()
        self._record(error or self._failure, left)

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        """Raises ApiError when the engine gives up on the request, or the server on all that still run."""
        for run in self._runs:
            self._wait_for(run)
        self._cut_off = cut_off = asyncio.ensure_future(self._service.cut_off.wait())
        while self._waiting:
            futures: list[asyncio.Future[Any]] = [cut_off, *self._waiting]
            await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
            if cut_off.done():
                raise self._end_early()
            for task in [task for task in self._waiting if task.done()]:
                run = self._waiting.pop(task)
                try:
                    deltas = run.advance(task.result())
                except BaseException as error:
                    self._failure = error
                    raise
                if deltas:
                    yield deltas
                if not run.ended:
                    self._wait_for(run)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(job.submit.prompt) for job in self._jobs)

    @property
    def num_cached_tokens(self) -> int | None:
        """Prompt tokens found in the prefix cache; None when a stop string ended the answer before the engine said."""
        counts = [run.num_cached_tokens for run in self._runs if run.num_cached_tokens is not None]
        return sum(counts) if len(counts) == len(self._runs) else None

    @property
    def num_completion_tokens(self) -> int:
        return sum(choice.num_tokens for run in self._runs for choice in run.choices)

    def prompt_logprobs(self, prompt: int) -> list[Logprobs]:
        """Of the prompt with this number, from its second token on; known before its first delta."""
        return self._runs[prompt].prompt_logprobs

    def _record(self, error: BaseException | None, left: bool) -> None:
        """Leave a trace, where traces are made. left: the caller did, before the end."""
        if self._service.tracing is None or self._caller is None:
            return
        first = [run.first_token_at for run in self._runs if run.first_token_at is not None]
        trace = Trace(
            self._caller,
            [job.submit for job in self._jobs],
            [done for run in self._runs for done in run.dones],
            min(first, default=None),
            self.num_completion_tokens,
            _fault(error, left),
        )
        self._service.tracing.ended(trace)

    def _wait_for(self, run: "_Run") -> None:
        self._waiting[asyncio.ensure_future(run.next())] = run

    def _end_early(self) -> ApiError:
        """The server waits for this answer no longer."""
        for run in self._runs:
            run.cancel()
        self._service.metrics.refused("unavailable")
        self._failure = shutting_down("The server is shutting down and cut this answer off; send the request again")
        return self._failure

    def _leave(self) -> None:
        for task in self._waiting:
            task.cancel()
        if self._cut_off is not None:
            self._cut_off.cancel()
        for run in self._runs:
            run.cancel()
        self._admission.close()


def _fault(error: BaseException | None, left: bool) -> Fault | None:
    if isinstance(error, Exception):
        shown = from_exception(error)
        return Fault(shown.code or shown.type, shown.message)
    return Fault("disconnected", "The caller left before the end") if left or error is not None else None


class _Run:
    """One submitted prompt and its choices."""

    def __init__(self, service: Service, job: Job, first_index: int) -> None:
        self._service = service
        self._job = job
        self._last_token_at: list[float | None] = [None] * job.submit.n
        self.choices = [Choice(job, first_index + i, service.tokenizer) for i in range(job.submit.n)]
        self._open = set(range(job.submit.n))  # choices the engine may still work on
        self.num_cached_tokens: int | None = None
        self.prompt_logprobs: list[Logprobs] = []
        self.dones: list[Done] = []
        self.first_token_at: float | None = None
        self.ended = False
        self._early: list[Event] = []  # came while the engine's consent was awaited
        self._stream: EventStream = service.engine.submit(job.submit)
        service.metrics.submitted(job.submit)

    async def accepted(self) -> None:
        """Wait until the engine has let in a request that it might refuse, so that a refusal gets its own status also
        where the answer is streamed. Raises ApiError."""
        if self._job.submit.kv_policy is not None:
            self._early = await self._stream.next()
            if isinstance(self._early[0], Failed):
                self._take(self._early[0])

    async def next(self) -> list[Event]:
        """What happened since the last call, at least one event."""
        early: list[Event] = [event for event in self._early if not isinstance(event, Accepted)]
        self._early = []
        return early or await self._stream.next()

    def advance(self, events: list[Event]) -> list[Delta]:
        """Take in what happened. Raises ApiError for Failed."""
        running = [choice for choice in self.choices if choice.finish_reason is None]
        for event in events:
            self._take(event)
        for choice in running:
            if choice.finish_reason is not None:
                seconds = time.monotonic() - self._job.submit.arrival
                self._service.metrics.finished(choice.finish_reason, choice.num_tokens, seconds)
        if all(choice.finish_reason is not None for choice in self.choices):
            self.cancel()
        else:
            self._cancel_choices()
        return [delta for choice in running if (delta := choice.take()) is not None]

    def cancel(self) -> None:
        """Stop what still runs; safe to call again."""
        if not self.ended:
            self.ended = True
            self._service.engine.cancel(self._job.submit.id)

    def _cancel_choices(self) -> None:
        """Stop the choices that met a stop string while others go on."""
        for number, choice in enumerate(self.choices):
            if choice.finish_reason is not None and number in self._open:
                self._open.remove(number)
                self._service.engine.cancel_choice(self._job.submit.id, number)

    def _take(self, event: Event) -> None:
        if isinstance(event, Token):
            self._measure(event.index)
            self.choices[event.index].token(event)
        elif isinstance(event, PromptLogprobs):
            self.prompt_logprobs = event.entries
        elif isinstance(event, Done):
            if event.index == 0:  # the others find the prompt that this one has just computed
                self.num_cached_tokens = event.num_cached_tokens
            self._service.metrics.stages(event)
            self.dones.append(event)
            self._open.discard(event.index)
            self.choices[event.index].done(event)
        elif isinstance(event, Failed):
            self.ended = True
            self._service.metrics.refused(event.kind)
            raise from_failed(event)

    def _measure(self, index: int) -> None:
        now, before = time.monotonic(), self._last_token_at[index]
        metrics = self._service.metrics
        metrics.generation_tokens.inc()
        self.first_token_at = self.first_token_at or now
        if before is None:
            metrics.first_token.observe(now - self._job.submit.arrival)
        else:
            metrics.between_tokens.observe(now - before)
        self._last_token_at[index] = now
