"""The URL table."""

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
    add = app.add_api_route
    add("/v1/chat/completions", chat.create_chat_completion, methods=["POST"], tags=["OpenAI"])
    add("/v1/completions", completions.create_completion, methods=["POST"], tags=["OpenAI"])
    add("/v1/models", models.list_models, methods=["GET"], tags=["OpenAI"])
    add("/v1/models/{model:path}", models.get_model, methods=["GET"], tags=["OpenAI"])
    add("/tokenize", tokens.tokenize, methods=["POST"], tags=["Tokens"])
    add("/detokenize", tokens.detokenize, methods=["POST"], tags=["Tokens"])
    add("/health", health.health, methods=["GET"], tags=["Operations"])
    add("/ready", health.ready, methods=["GET"], tags=["Operations"])
    add("/metrics", health.metrics, methods=["GET"], tags=["Operations"])
    return app
