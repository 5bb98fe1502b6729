"""The URL table."""

from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from engine.client import EngineClient
from server import errors
from server.body import StrictRoute
from server.config import ServerConfig
from server.gate import REQUEST_ID, AccessLog, Gate
from server.keys import KeyRing
from server.routes import chat, completions, health, models, tokens
from server.service import Service
from server.tokenizer import Tokenizer
from server.tracing import Tracing

DESCRIPTION = "Inference for language models that are already quantized. The routes under /v1 follow OpenAI's API."


def create_app(
    engine: EngineClient,
    tokenizer: Tokenizer,
    config: ServerConfig,
    served_name: str = "demo",
    keys: KeyRing | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """The HTTP face of `engine`, which the caller starts and stops. keys: who may ask; None: anybody."""
    app = FastAPI(title="Nibble", description=DESCRIPTION, redoc_url=None)
    service = app.state.service = Service(engine, tokenizer, config, served_name, tracing)
    errors.install(app)
    app.router.route_class = StrictRoute
    app.add_middleware(Gate, keys=keys or KeyRing(), refused=service.metrics.refused)
    if config.cors_origins is not None:  # before the gate: a browser asks without a key whether it may
        origins = [origin.strip() for origin in config.cors_origins.split(",")]
        exposed = [REQUEST_ID, "retry-after"]
        methods, headers = ["GET", "POST"], ["*"]
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=methods, allow_headers=headers, expose_headers=exposed
        )
    app.add_middleware(
        AccessLog,
        enabled=config.access_log,
        with_prompts=config.log_prompts,
        answered=service.metrics.answered,
    )
    add = partial(_add, app)
    add("/v1/chat/completions", chat.create_chat_completion, methods=["POST"], tags=["OpenAI"])
    add("/v1/completions", completions.create_completion, methods=["POST"], tags=["OpenAI"])
    add("/v1/models", models.list_models, methods=["GET"], tags=["OpenAI"])
    add("/v1/models/{model:path}", models.get_model, methods=["GET"], tags=["OpenAI"])
    add("/tokenize", tokens.tokenize, methods=["POST"], tags=["Tokens"])
    add("/detokenize", tokens.detokenize, methods=["POST"], tags=["Tokens"])
    add("/", health.index, methods=["GET"], tags=["Operations"])
    _add_operations(app, with_metrics=config.ops_port is None)
    return app


def create_ops_app(service: Service) -> FastAPI:
    """What only operators need, for a port of its own."""
    app = FastAPI(title="Nibble operations", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    errors.install(app)
    _add_operations(app, with_metrics=True)
    return app


def _add_operations(app: FastAPI, with_metrics: bool) -> None:
    _add(app, "/health", health.health, methods=["GET"], tags=["Operations"])
    _add(app, "/ready", health.ready, methods=["GET"], tags=["Operations"])
    if with_metrics:
        _add(app, "/metrics", health.metrics, methods=["GET"], tags=["Operations"])


def _add(app: FastAPI, path: str, endpoint: Callable[..., Any], methods: list[str], tags: list[str | Enum]) -> None:
    app.add_api_route(path, endpoint, methods=methods, tags=tags)
    if methods == ["GET"]:  # uvicorn leaves the body out
        app.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)
