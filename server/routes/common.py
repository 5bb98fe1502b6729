"""What the routes share."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from starlette.requests import ClientDisconnect

from server.generation import Generation
from server.schemas.common import PromptTokensDetails, Usage
from server.service import Service
from server.tracing import Caller

Result = TypeVar("Result")
SHORT_BODY = 4096  # bytes; longer ones are tokenized in a thread, so that other answers keep streaming


async def get_service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(get_service)]


async def off_loop(request: Request, work: Callable[[], Result]) -> Result:
    """Run `work` on what came with `request` without holding up the event loop for long.

    The size of the body decides: a thousand empty messages are as much work as one long text.
    """
    return work() if len(await request.body()) <= SHORT_BODY else await asyncio.to_thread(work)


def caller(request: Request, model: str) -> Caller:
    """What a trace says of who asked."""
    return Caller(request.url.path, model, request.state.request_id, request.headers)


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client goes away. Raises ClientDisconnect then."""
    answer = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        gone.cancel()
        if not answer.done():
            answer.cancel()
            await asyncio.wait({answer})


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def usage(generation: Generation) -> Usage:
    prompt, completion = generation.num_prompt_tokens, generation.num_completion_tokens
    cached = generation.num_cached_tokens
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=None if cached is None else PromptTokensDetails(cached_tokens=cached),
    )
