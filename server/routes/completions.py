"""POST /v1/completions."""

import time
import uuid
from collections.abc import Iterable, Sequence

from fastapi import Request, Response

from engine.messages import Logprobs, PlanSummary
from server.admission import Limits, check_length, jobs
from server.generation import Delta, Generation, ScoredToken
from server.routes.chat import finite
from server.routes.common import ServiceDep, caller, off_loop, unless_disconnected, usage
from server.schemas import completions as wire
from server.schemas.common import Usage
from server.service import Service
from server.sse import EventStream
from server.tokenizer import Detokenizer, Tokenizer

DEFAULT_MAX_TOKENS = 16  # OpenAI's


async def create_completion(body: wire.CompletionRequest, request: Request, service: ServiceDep) -> Response:
    """Continue a text or several, at once or (with `stream`) as server-sent events.

    Every field is honoured or refused with 400 and its name.
    """
    service.check_model(body.model)
    plan = service.plan()
    prompts = await off_loop(request, lambda: _prompt_ids(body, service.tokenizer, plan))
    limits = Limits(
        max_tokens=body.max_tokens,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        num_logprobs=body.logprobs,
        num_prompt_logprobs=body.logprobs if body.echo else None,
    )
    generation = Generation(service, jobs(body, prompts, limits, plan), caller(request, body.model))
    writer = _Writer(body, prompts, service, generation)
    if body.stream:
        last = (lambda: [writer.usage_chunk()]) if body.include_usage else list
        return EventStream(generation, tuple, writer.chunks, last)
    answer = await unless_disconnected(request, writer.answer())
    return Response(answer.model_dump_json(), media_type="application/json")


def _prompt_ids(body: wire.CompletionRequest, tokenizer: Tokenizer, plan: PlanSummary) -> list[list[int]]:
    add_special = body.add_special_tokens is not False
    for prompt in body.prompts:
        if isinstance(prompt, str):
            check_length(prompt, tokenizer, plan, "prompt")
    return [tokenizer.encode(p, add_special) if isinstance(p, str) else list(p) for p in body.prompts]


class _Writer:
    """The answers in the completions format, whole or in chunks."""

    def __init__(
        self, body: wire.CompletionRequest, prompts: list[list[int]], service: Service, generation: Generation
    ) -> None:
        self._body = body
        self._prompts = prompts
        self._generation = generation
        self._tokenizer = service.tokenizer
        self._n = body.n or 1
        self._echoes: dict[int, tuple[str, wire.CompletionLogprobs | None]] = {}  # of prompts, when first needed
        self._begun: set[int] = set()  # choices whose echo is out
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())

    async def answer(self) -> wire.CompletionResponse:
        choices: list[list[wire.CompletionChoice]] = [[] for _ in range(len(self._prompts) * self._n)]
        async with self._generation:
            async for deltas in self._generation:
                for delta in deltas:
                    choices[delta.index].append(self._choice(delta))
        return self._response([_join(pieces) for pieces in choices], usage(self._generation))

    def chunks(self, delta: Delta) -> Iterable[str]:
        yield self._response([self._choice(delta)]).model_dump_json(exclude_unset=True)

    def usage_chunk(self) -> str:
        return self._response([], usage(self._generation)).model_dump_json(exclude_unset=True)

    def _response(self, choices: list[wire.CompletionChoice], usage: Usage | None = None) -> wire.CompletionResponse:
        shows_usage = usage is not None or self._body.include_usage
        return wire.CompletionResponse(
            id=self._id,
            object="text_completion",
            created=self._created,
            model=self._body.model,
            choices=choices,
            **({"usage": usage} if shows_usage else {}),
        )

    def _choice(self, delta: Delta) -> wire.CompletionChoice:
        """A piece of a choice; the first one carries the echo."""
        before, scored = self._echo(delta.index // self._n) if self._body.echo else ("", None)
        logprobs = self._logprobs(delta.tokens, len(before)) if self._body.logprobs is not None else None
        text = delta.text
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            text = before + text
            logprobs = _concat([scored, logprobs])
        return wire.CompletionChoice(index=delta.index, text=text, logprobs=logprobs, finish_reason=delta.finish_reason)

    def _echo(self, prompt: int) -> tuple[str, wire.CompletionLogprobs | None]:
        """The text of a prompt, and its log-probabilities when they were asked for."""
        if prompt not in self._echoes:
            ids = self._prompts[prompt]
            detokenizer = Detokenizer(self._tokenizer, (), self._body.skip_special_tokens is not False)
            text, offsets = "", []
            for token in ids:
                offsets.append(len(text))
                text += detokenizer.push(token)
            text += detokenizer.flush()
            scored = None
            if self._body.logprobs is not None:
                entries = [None, *self._generation.prompt_logprobs(prompt)]
                tokens = zip(ids, entries, offsets, strict=True)
                scored = self._logprobs([ScoredToken(*token) for token in tokens], 0)
            self._echoes[prompt] = text, scored
        return self._echoes[prompt]

    def _logprobs(self, tokens: Sequence[ScoredToken], offset: int) -> wire.CompletionLogprobs:
        return wire.CompletionLogprobs(
            tokens=[token_text(token.token, self._tokenizer) for token in tokens],
            token_logprobs=[finite(token.logprobs.logprob) if token.logprobs else None for token in tokens],
            top_logprobs=[self._top(token.logprobs) for token in tokens],
            text_offset=[offset + token.offset for token in tokens],
        )

    def _top(self, scored: Logprobs | None) -> dict[str, float] | None:
        """The likeliest tokens, and the chosen one if it is not among them."""
        if scored is None:
            return None
        pairs = [*scored.top, (scored.token, scored.logprob)]
        return {token_text(token, self._tokenizer): finite(logprob) for token, logprob in pairs}


def token_text(token: int, tokenizer: Tokenizer) -> str:
    """A token as the completions format names it: its text, or "bytes:\\xe2\\x82" for a part of a character."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _join(pieces: list[wire.CompletionChoice]) -> wire.CompletionChoice:
    last = pieces[-1]
    return wire.CompletionChoice(
        index=last.index,
        text="".join(piece.text for piece in pieces),
        logprobs=_concat([piece.logprobs for piece in pieces]),
        finish_reason=last.finish_reason,
    )


def _concat(parts: Sequence[wire.CompletionLogprobs | None]) -> wire.CompletionLogprobs | None:
    given = [part for part in parts if part is not None]
    if not given:
        return None
    return wire.CompletionLogprobs(
        tokens=[token for part in given for token in part.tokens],
        token_logprobs=[value for part in given for value in part.token_logprobs],
        top_logprobs=[value for part in given for value in part.top_logprobs],
        text_offset=[value for part in given for value in part.text_offset],
    )
