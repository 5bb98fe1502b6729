"""The ports of a server: had before anything that takes long, opened when somebody will answer."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from server.config import ServerConfig

BACKLOG = 2048  # connections that wait to be accepted
Sockets = tuple[socket.socket, socket.socket | None]  # of the API, and of --ops-port


def fail(message: str, code: int) -> NoReturn:
    """Say what is wrong, without a traceback, and exit."""
    say(message)
    raise typer.Exit(code)


def say(message: str) -> None:
    Console(stderr=True, highlight=False).print(f"[bold red]nibble:[/bold red] {escape(message)}", soft_wrap=True)


def bind(host: str, port: int) -> socket.socket:
    """A port that is ours and still closed: callers are refused, not kept waiting, while a model is fetched.

    Raises OSError; so may `listen` on it, when another server took the port in the meantime.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # also right after the last server has ended
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, port))
    except OSError:
        sock.close()
        raise
    return sock


def listen(sock: socket.socket) -> None:
    """Open the port, so that clients can ask /ready while the model loads. Raises OSError."""
    sock.listen(BACKLOG)


def bind_or_fail(host: str, port: int, flag: str) -> socket.socket:
    """A port of ours, still closed; ends the program where there is none to be had."""
    try:
        return bind(host, port)
    except OSError as error:
        fail(no_port(error, host, port, flag), 1)


@contextmanager
def bound(settings: ServerConfig) -> Iterator[Sockets]:
    """The ports to serve on, which are had before anything that takes long, still closed."""
    with ExitStack() as stack:
        sock = stack.enter_context(bind_or_fail(settings.host, settings.port, "--port"))
        ops = None if settings.ops_port is None else bind_or_fail(settings.host, settings.ops_port, "--ops-port")
        yield sock, None if ops is None else stack.enter_context(ops)


def open_ports(sockets: Sockets, settings: ServerConfig) -> None:
    """Let clients ask, who hear that the model is still loading. Ends the program where another server was quicker."""
    for sock, port, flag in zip(sockets, (settings.port, settings.ops_port), ("--port", "--ops-port"), strict=True):
        try:
            if sock is not None:
                listen(sock)
        except OSError as error:  # it bound in the same moment
            fail(no_port(error, settings.host, port or 0, flag), 1)


def no_port(error: OSError, host: str, port: int, flag: str) -> str:
    """Why a port cannot be had, and how to choose another port or address."""
    number = error.errno or 0  # negative when the host's name cannot be resolved
    reason = os.strerror(number) if number > 0 else error.strerror  # error.strerror would repeat the address
    make = ", or with make serve PORT=N" if flag == "--port" else ""
    taken = number in (errno.EADDRINUSE, errno.EACCES)
    advice = f"another port with {flag} N{make}" if taken else "another address with --host"
    return f"Cannot listen on {host} port {port}: {reason}. Choose {advice}"


def address(host: str, port: int, scheme: str = "http") -> str:
    """A URL that works on this machine."""
    if host in ("0.0.0.0", "::"):
        host = "localhost"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
