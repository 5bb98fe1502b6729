"""A server over a scripted engine, in this process."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from server.app import create_app
from server.config import ServerConfig
from server.service import Service
from server.tokenizer import Tokenizer
from server.tracing import Tracing
from tests.fakes import ByteTokenizer, FakeEngine

CHAT: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}
TEXT: dict[str, Any] = {"model": "demo", "prompt": "hi", "max_tokens": 100}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class World:
    """One app, its engine, and ways to talk to it."""

    def __init__(
        self, engine: FakeEngine, tokenizer: Tokenizer | None = None, tracing: Tracing | None = None, **settings: Any
    ) -> None:
        self.engine = engine
        self.app = create_app(engine, tokenizer or ByteTokenizer(), ServerConfig(**settings), tracing=tracing)
        self.service: Service = self.app.state.service
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://test")
        client: Any = self.http  # newer clients are typed for a successor of httpx with the same interface
        self.openai = openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", max_retries=0, http_client=client)

    async def post(self, path: str, body: dict[str, Any], **more: Any) -> httpx.Response:
        return await self.http.post(path, json=body | more)

    async def chat(self, **more: Any) -> httpx.Response:
        return await self.post("/v1/chat/completions", CHAT, **more)

    async def text(self, **more: Any) -> httpx.Response:
        return await self.post("/v1/completions", TEXT, **more)


MakeWorld = Callable[..., World]


def events(response: httpx.Response) -> list[Any]:
    """The JSON of every event of a finished stream; the last, [DONE], as text."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    payloads = [line.removeprefix("data: ") for line in lines]
    return [payload if payload == "[DONE]" else json.loads(payload) for payload in payloads]
