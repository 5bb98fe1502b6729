"""POST /v1/chat/completions."""

import time
import uuid
from collections.abc import Iterable

from fastapi import Request, Response

from engine.messages import Logprobs, PlanSummary
from server.admission import Limits, check_length, jobs
from server.chat import chat_prompt
from server.generation import Delta, Generation, ScoredToken
from server.routes.common import ServiceDep, caller, off_loop, unless_disconnected, usage
from server.schemas import chat as wire
from server.schemas.common import Usage
from server.service import Service
from server.sse import EventStream
from server.tokenizer import Tokenizer


async def create_chat_completion(body: wire.ChatRequest, request: Request, service: ServiceDep) -> Response:
    """Answer a conversation, at once or (with `stream`) as server-sent events.

    Every field is honoured or refused with 400 and its name.
    """
    service.check_model(body.model)
    plan = service.plan()
    prompt = await off_loop(request, lambda: _prompt_ids(body, service.tokenizer, plan))
    limits = Limits(
        max_tokens=body.max_completion_tokens or body.max_tokens,
        default_max_tokens=None,
        num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_field="messages",
    )
    generation = Generation(service, jobs(body, [prompt], limits, plan), caller(request, body.model))
    writer = _Writer(body, service)
    if body.stream:
        last = (lambda: [writer.usage_chunk(generation)]) if body.include_usage else list
        return EventStream(generation, writer.first_chunks, writer.chunks, last)
    answer = await unless_disconnected(request, writer.answer(generation))
    return Response(answer.model_dump_json(), media_type="application/json")


def _prompt_ids(body: wire.ChatRequest, tokenizer: Tokenizer, plan: PlanSummary) -> list[int]:
    text = chat_prompt(body, tokenizer)
    check_length(text, tokenizer, plan, "messages")
    return tokenizer.encode(text, add_special_tokens=False)


class _Writer:
    """One answer in the chat format, whole or in chunks."""

    def __init__(self, body: wire.ChatRequest, service: Service) -> None:
        self._body = body
        self._tokenizer = service.tokenizer
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())

    async def answer(self, generation: Generation) -> wire.ChatResponse:
        pieces: list[list[Delta]] = [[] for _ in range(self._body.n or 1)]
        async with generation:
            async for deltas in generation:
                for delta in deltas:
                    pieces[delta.index].append(delta)
        return wire.ChatResponse(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=self._body.model,
            choices=[self._choice(index, deltas) for index, deltas in enumerate(pieces)],
            usage=usage(generation),
        )

    def first_chunks(self) -> Iterable[str]:
        """The role of each choice, before any token is known."""
        role = wire.Delta(role="assistant", content="")
        for index in range(self._body.n or 1):
            yield self._chunk(wire.ChatChunkChoice(index=index, delta=role, logprobs=None, finish_reason=None))

    def chunks(self, delta: Delta) -> Iterable[str]:
        """The text and the end are two chunks, as OpenAI sends them."""
        if delta.text or delta.tokens:
            scored = self._logprobs(delta.tokens)
            piece = wire.Delta(content=delta.text)
            yield self._chunk(wire.ChatChunkChoice(index=delta.index, delta=piece, logprobs=scored, finish_reason=None))
        if delta.finish_reason:
            yield self._chunk(
                wire.ChatChunkChoice(
                    index=delta.index, delta=wire.Delta(), logprobs=None, finish_reason=delta.finish_reason
                )
            )

    def usage_chunk(self, generation: Generation) -> str:
        return self._chunk(usage=usage(generation))

    def _chunk(self, *choices: wire.ChatChunkChoice, usage: Usage | None = None) -> str:
        chunk = wire.ChatChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._body.model,
            choices=list(choices),
            **({"usage": usage} if self._body.include_usage else {}),
        )
        return chunk.model_dump_json(exclude_unset=True)

    def _choice(self, index: int, deltas: list[Delta]) -> wire.ChatChoice:
        reason = deltas[-1].finish_reason
        assert reason is not None
        tokens = tuple(token for delta in deltas for token in delta.tokens)
        message = wire.AnswerMessage(role="assistant", content="".join(delta.text for delta in deltas))
        return wire.ChatChoice(index=index, message=message, logprobs=self._logprobs(tokens), finish_reason=reason)

    def _logprobs(self, tokens: tuple[ScoredToken, ...]) -> wire.ChoiceLogprobs | None:
        if not self._body.logprobs:
            return None
        content = [_token_logprob(token.logprobs, self._tokenizer) for token in tokens if token.logprobs is not None]
        return wire.ChoiceLogprobs(content=content, refusal=None)


def _token_logprob(scored: Logprobs, tokenizer: Tokenizer) -> wire.TokenLogprob:
    chosen = _top_logprob(scored.token, scored.logprob, tokenizer)
    return wire.TokenLogprob(
        token=chosen.token,
        logprob=chosen.logprob,
        bytes=chosen.bytes,
        top_logprobs=[_top_logprob(token, logprob, tokenizer) for token, logprob in scored.top],
    )


def _top_logprob(token: int, logprob: float, tokenizer: Tokenizer) -> wire.TopLogprob:
    data = tokenizer.token_bytes(token)
    return wire.TopLogprob(token=data.decode("utf-8", "replace"), logprob=finite(logprob), bytes=list(data))


def finite(logprob: float) -> float:
    """JSON has no -inf; OpenAI writes -9999 for a token that cannot be drawn."""
    return max(logprob, -9999.0)
