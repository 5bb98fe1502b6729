"""The engine as a process of its own:  python -m engine.process ADDRESS

It connects to the server's socket, receives an EngineConfig, loads the model, and steps until told to stop or until the
server is gone. Signals that stop a whole process group are left to the server, which drains first.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence

import msgspec
import zmq

from engine.assembly import StartError, build
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.messages import Inbound, Outbound, Ready, Shutdown, StartFailed

IDLE_POLL_MS = 1000  # how soon an idle engine notices that its server is gone
ENCODER = msgspec.msgpack.Encoder()

Send = Callable[[Sequence[Outbound]], None]


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.set(zmq.SNDHWM, 0)  # a slow server must not stop the batch; what can pile up is bounded by max_tokens
    socket.set(zmq.LINGER, 1000)
    socket.connect(sys.argv[1])
    config = msgspec.msgpack.decode(socket.recv(), type=EngineConfig)
    send = _sender(socket)
    try:
        core, summary = build(config, on_loading=lambda progress: send([progress]))
    except StartError as error:
        send([StartFailed(str(error))])
    else:
        send([Ready(summary), core.stats()])
        serve(core, socket, send)
    context.destroy(linger=1000)


def serve(core: EngineCore, socket: "zmq.Socket[bytes]", send: Send) -> None:
    """Step while there is work, sleep while there is none. Returns on Shutdown or when the parent process is gone."""
    decoder = msgspec.msgpack.Decoder(Inbound)
    parent = os.getppid()
    while os.getppid() == parent:
        if not core.has_work and not socket.poll(IDLE_POLL_MS):
            continue
        inbox: list[Inbound] = []
        while socket.poll(0):
            inbox.append(decoder.decode(socket.recv()))
        if any(isinstance(message, Shutdown) for message in inbox):
            return
        send([*core.step(inbox), core.stats()])


def _sender(socket: "zmq.Socket[bytes]") -> Send:
    def send(messages: Sequence[Outbound]) -> None:
        socket.send(ENCODER.encode(messages))

    return send


if __name__ == "__main__":
    main()
