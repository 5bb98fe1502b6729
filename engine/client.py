"""What the server sees of the engine: the protocol, and the client that runs it in a process of its own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from engine.config import EngineConfig
from engine.messages import (
    CalibrationReport,
    CalibrationSettings,
    Conversion,
    ConversionSettings,
    Event,
    Inspection,
    Loading,
    Ready,
    Stats,
    Submit,
)

GGUF = ".gguf"  # of a file that is a model by itself
# Any of these in a folder makes a tokenizer that transformers reads.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json", "*.tiktoken",
)  # fmt: skip
EngineState = Literal["starting", "ready", "restarting", "stopped", "failed"]


class EngineUnavailable(RuntimeError):
    """The engine takes no requests now (starting, restarting, stopped); `retry_after_s` says when to ask again."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EventStream(Protocol):
    """The events of one request, in order. Ends after the last Done or the one Failed."""

    async def next(self) -> list[Event]:
        """Wait for at least one event and return all that have arrived. Call it no more after the last one."""
        ...


class EngineClient(Protocol):
    """A running engine, in another process or in this one. All methods belong to one asyncio loop."""

    @property
    def state(self) -> EngineState: ...

    @property
    def ready(self) -> Ready | None:
        """The plan, once the engine has loaded its model (kept while it restarts)."""
        ...

    @property
    def stats(self) -> Stats:
        """The newest figures the engine sent."""
        ...

    @property
    def process_id(self) -> int | None:
        """Of the engine while it runs in a process of its own."""
        ...

    async def start(self) -> None:
        """Begin loading, unless that has begun; returns at once. Progress and the outcome show in `state`."""
        ...

    async def wait_ready(self) -> Ready:
        """Wait until the model is loaded. Raises EngineUnavailable, with the engine's reason, when it cannot be."""
        ...

    def submit(self, request: Submit) -> EventStream:
        """Hand a request over. Raises EngineUnavailable when the engine is not ready; changes nothing then."""
        ...

    def cancel(self, request_id: str) -> None:
        """Stop a request and drop its events. Unknown and finished ids are fine; safe to call twice."""
        ...

    def cancel_choice(self, request_id: str, index: int) -> None:
        """Stop one choice that has produced tokens; its Done and the other choices' events still come."""
        ...

    async def stop(self) -> None:
        """End the engine at once. Requests in flight get Failed(kind="engine")."""
        ...


@contextmanager
def start_engine(config: EngineConfig, on_loading: Callable[[Loading], None] | None = None) -> Iterator[EngineClient]:
    """A client whose engine loads from now on, in a process of its own that ends with the block at the latest.

    The client hears of it once its `start` is awaited, and `on_loading` with it: the time until then is for what the
    server has to import and to read. Raises EngineUnavailable when there can be no process.
    """
    from engine.remote import RemoteClient  # the implementation names this module's types

    client = RemoteClient(config, on_loading)
    try:
        client.spawn()
    except OSError as error:
        raise EngineUnavailable(f"the engine process cannot be run: {error}", retry_after_s=0) from error
    try:
        yield client
    finally:
        client.kill()


def locate_model(model: str, revision: str | None = None, offline: bool = False) -> Path:
    """Return the folder of a checkpoint: `model` itself when it is one, else a snapshot from the hub.

    Raises CheckpointError (a ValueError) that says what is missing: network, repository, revision, access.
    """
    from engine.checkpoint.hub import resolve

    return resolve(model, revision, offline)


def file_tokenizer(model: Path) -> tuple[Any, str | None]:
    """The tokenizer that a GGUF file carries, as transformers holds one, and its chat template. Imports no torch.

    Raises CheckpointError (a ValueError).
    """
    from engine.checkpoint.gguf_tokenizer import read_gguf_tokenizer

    return read_gguf_tokenizer(model)


def inspect_model(config: EngineConfig, on_loading: Callable[[Loading], None] | None = None) -> Inspection:
    """Load the model in this process and return its roofline. Raises EngineUnavailable when it cannot be loaded."""
    from engine.assembly import StartError
    from engine.inspection import inspect

    try:
        return inspect(config, on_loading)
    except StartError as error:
        raise EngineUnavailable(str(error), retry_after_s=0) from error


def calibrate_model(
    settings: CalibrationSettings, on_progress: Callable[[Loading], None] | None = None
) -> CalibrationReport:
    """Write a calibration artifact; progress counts layers. Raises ValueError naming what is wrong with the policy, the
    text, the model or the place to write."""
    from engine.calibration.run import calibrate

    return calibrate(settings, on_progress)


def conversion_forecast(model: Path, settings: ConversionSettings) -> tuple[str, ...]:
    """What a user should know before a conversion begins: layers that no fast kernel would serve. Raises as
    `convert_model`."""
    from engine.conversion.forecast import slow_kernels

    return slow_kernels(model, settings)


def convert_model(
    model: Path, destination: Path, settings: ConversionSettings, on_progress: Callable[[Loading], None] | None = None
) -> Conversion:
    """Write the checkpoint in Nibble's container. Raises ValueError naming what cannot be served."""
    from engine.conversion.convert import convert

    return convert(model, destination, settings, on_progress)
