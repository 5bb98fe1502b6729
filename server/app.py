"""The URL table."""

from collections.abc import Callable
from enum import Enum
from typing import Any

from fastapi import FastAPI

from engine.client import EngineClient
from server import errors
from server.body import StrictRoute
from server.config import ServerConfig
from server.routes import chat, completions, health, models, tokens
from server.service import Service
from server.tokenizer import Tokenizer

DESCRIPTION = "Inference for language models that are already quantized. The routes under /v1 follow OpenAI's API."


def create_app(engine: EngineClient, tokenizer: Tokenizer, config: ServerConfig, served_name: str = "demo") -> FastAPI:
    """The HTTP face of `engine`, which the caller starts and stops."""
    app = FastAPI(title="Nibble", description=DESCRIPTION, redoc_url=None)
    app.state.service = Service(engine, tokenizer, config, served_name)
    errors.install(app)
    app.router.route_class = StrictRoute

    def add(path: str, endpoint: Callable[..., Any], methods: list[str], tags: list[str | Enum]) -> None:
        app.add_api_route(path, endpoint, methods=methods, tags=tags)
        if methods == ["GET"]:  # uvicorn leaves the body out
            app.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)

    add("/v1/chat/completions", chat.create_chat_completion, methods=["POST"], tags=["OpenAI"])
    add("/v1/completions", completions.create_completion, methods=["POST"], tags=["OpenAI"])
    add("/v1/models", models.list_models, methods=["GET"], tags=["OpenAI"])
    add("/v1/models/{model:path}", models.get_model, methods=["GET"], tags=["OpenAI"])
    add("/tokenize", tokens.tokenize, methods=["POST"], tags=["Tokens"])
    add("/detokenize", tokens.detokenize, methods=["POST"], tags=["Tokens"])
    add("/", health.index, methods=["GET"], tags=["Operations"])
    add("/health", health.health, methods=["GET"], tags=["Operations"])
    add("/ready", health.ready, methods=["GET"], tags=["Operations"])
    add("/metrics", health.metrics, methods=["GET"], tags=["Operations"])
    return app
