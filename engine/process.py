"""The engine as a process of its own: main() with the arguments ADDRESS, PARENT (a process id) and an EngineConfig as
JSON.

It loads the model, tells the server's socket of it, and steps until told to stop. The server may still be starting:
what is sent to it waits. The process leaves as soon as its parent is gone, in whatever it is doing. Signals are left to
the server, which drains first.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence

import msgspec
import torch
import zmq

from engine.assembly import StartError, build
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.messages import Inbound, Loading, Outbound, Ready, Shutdown, StartFailed

IDLE_POLL_MS = 1000  # how soon an idle engine notices that its server is gone
LINGER_MS = 1000  # for the last words
ENCODER = msgspec.msgpack.Encoder()

Send = Callable[[Sequence[Outbound]], None]


class Orphaned(Exception):
    """The server is gone: nobody waits for this engine."""


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    address, parent = sys.argv[1], int(sys.argv[2])
    config = msgspec.json.decode(sys.argv[3], type=EngineConfig)
    be_alone()
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.set(zmq.SNDHWM, 0)  # a slow server must not stop the batch; what can pile up is bounded by max_tokens
    socket.connect(address)
    try:
        run(config, socket, parent)
    except Orphaned:
        pass
    finally:
        context.destroy(linger=LINGER_MS)


def be_alone() -> None:
    """Say that nothing here is spread over processes, or transformers imports torch's distributed tensors with the
    model's configuration, which takes 0.5 s. In a process of the user's that is for the user to say."""
    torch.distributed.is_available = lambda: False


def run(config: EngineConfig, socket: "zmq.Socket[bytes]", parent: int) -> None:
    """From loading the model to the last step. Raises Orphaned when the process `parent` is no longer the parent."""
    send = _sender(socket)

    def on_loading(progress: Loading) -> None:
        _check_parent(parent)
        send([progress])

    _check_parent(parent)
    try:
        core, summary = build(config, on_loading)
    except StartError as error:
        send([StartFailed(str(error))])
        return
    send([Ready(summary), core.stats()])
    serve(core, socket, send, parent)


def serve(core: EngineCore, socket: "zmq.Socket[bytes]", send: Send, parent: int) -> None:
    """Step while there is work, sleep while there is none. Returns on Shutdown; raises Orphaned."""
    decoder = msgspec.msgpack.Decoder(Inbound)
    while True:
        if core.has_work:
            _check_parent(parent)
        else:
            _wait(socket, parent)
        inbox: list[Inbound] = []
        while socket.poll(0):
            inbox.append(decoder.decode(socket.recv()))
        if any(isinstance(message, Shutdown) for message in inbox):
            return
        send([*core.step(inbox), core.stats()])


def _wait(socket: "zmq.Socket[bytes]", parent: int) -> None:
    """Until a message has come. Raises Orphaned."""
    _check_parent(parent)
    while not socket.poll(IDLE_POLL_MS):
        _check_parent(parent)


def _check_parent(parent: int) -> None:
    if os.getppid() != parent:
        raise Orphaned


def _sender(socket: "zmq.Socket[bytes]") -> Send:
    def send(messages: Sequence[Outbound]) -> None:
        socket.send(ENCODER.encode(messages))

    return send
