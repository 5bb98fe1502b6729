"""`nibble serve` while its engine loads, and after: the only place where the parts of a server are wired."""

import asyncio
import logging
import ssl
import sys
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI

from engine.client import EngineClient, EngineUnavailable
from engine.messages import Ready
from server import lifecycle, screen
from server.app import create_app, create_ops_app
from server.config import ServerConfig
from server.gate import AccessLogHandler
from server.keys import KeyRing
from server.lifecycle import Interrupted
from server.ports import Sockets, address, fail, open_ports
from server.tokenizer import Tokenizer, load_tokenizer
from server.tracing import Tracing

__all__ = ["Given", "Interrupted", "Parts", "prepare", "serve"]


@dataclass(frozen=True)
class Given:
    """What was decided before the engine began to load."""

    settings: ServerConfig
    model: Path  # a folder, or a GGUF file
    name: str  # under which it is served
    keys: KeyRing
    sockets: Sockets


@dataclass(frozen=True)
class Parts:
    """What is read and wired while the engine loads."""

    app: FastAPI
    tokenizer: Tokenizer
    tracing: Tracing | None


def prepare(given: Given, engine: EngineClient) -> Parts:
    """Ends the program where the tokenizer, the tracing or a port cannot be had."""
    settings = given.settings
    set_up_access_log()
    try:
        tokenizer = load_tokenizer(given.model, settings.chat_template)
        tracing = None if settings.otlp_endpoint is None else Tracing.to(settings.otlp_endpoint)
    except ValueError as error:  # TokenizerError, TracingUnavailable
        fail(str(error), 2)
    open_ports(given.sockets, settings)
    app = create_app(engine, tokenizer, settings, given.name, given.keys, tracing)
    return Parts(app, tokenizer, tracing)


def serve(given: Given, parts: Parts, engine: EngineClient, bar: screen.LoadingBar) -> None:
    """Serve the model until a signal. Ends the program where the model or the certificate cannot be used; raises
    Interrupted when the signal comes before the model is loaded."""

    def on_ready(ready: Ready) -> None:
        bar.stop()
        chat = parts.tokenizer.has_chat_template
        screen.print_start(bar.console, ready.plan, given.name, door_of(given), chat)

    bar.start()
    try:
        asyncio.run(lifecycle.serve(ports(parts.app, given), engine, on_ready))
    except EngineUnavailable as error:
        bar.stop()
        fail(str(error), 1)
    finally:
        if parts.tracing is not None:
            parts.tracing.close()


def door_of(given: Given) -> screen.Door:
    """What the start screen says of the address and of who may ask there."""
    settings, (sock, ops_sock) = given.settings, given.sockets
    scheme = "http" if settings.tls_cert is None else "https"
    keys = [
        *(["the key of --api-key"] if settings.api_key is not None else []),
        *([f"a key of {settings.api_keys}"] if settings.api_keys is not None else []),
    ]
    logged = "each request as a line of standard output" + (", with its beginning" if settings.log_prompts else "")
    facts = [
        *([("access", f"requests need {' or '.join(keys)}")] if keys else []),
        *([("browsers", f"pages of {settings.cors_origins} may ask")] if settings.cors_origins else []),
        *([("log", logged)] if settings.access_log else []),
        *([("traces", f"sent to {settings.otlp_endpoint}")] if settings.otlp_endpoint is not None else []),
    ]
    if ops_sock is not None:
        facts.append(("metrics", f"{address(settings.host, ops_sock.getsockname()[1], 'http')}/metrics"))
    certificate = None if settings.tls_cert is None else str(settings.tls_cert)
    url = address(settings.host, sock.getsockname()[1], scheme)
    return screen.Door(url, tuple(facts), bool(keys), certificate)


def ports(app: FastAPI, given: Given) -> lifecycle.Ports:
    """The servers of `nibble serve`. Ends the program when the certificate cannot be used."""
    settings, (sock, ops_sock) = given.settings, given.sockets
    try:
        server = lifecycle.DrainingServer(app, access_log=settings.log_level == "debug")
        server.config.load()
    except (ssl.SSLError, OSError) as error:
        fail(f"--tls-cert {settings.tls_cert} and --tls-key {settings.tls_key} cannot be used: {error}", 2)
    ops = None if ops_sock is None else (lifecycle.OpsServer(create_ops_app(app.state.service)), ops_sock)
    return lifecycle.Ports(server, sock, ops)


def set_up_access_log() -> None:
    """JSON lines, whatever the level of the rest."""
    access = logging.getLogger("nibble.access")
    access.setLevel(logging.INFO)
    access.propagate = False
    access.handlers = [AccessLogHandler(sys.stdout)]
