"""Where a conversion is written until it is whole: a hidden folder beside the destination, which is renamed at the end.

Every finished shard is recorded, so that a conversion that was interrupted continues where it stopped, and so that one
with other settings never continues it.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from engine.conversion.encoder import ConversionRefused
from engine.messages import ConvertedLayer

STATE, LOCK = "conversion.json", "conversion.lock"
MAIN, INDEX = "model.safetensors", "model.safetensors.index.json"
NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf")  # weights


class Shard(msgspec.Struct, frozen=True):
    """One file of the destination that is whole."""

    schemes: dict[str, Any]  # module -> scheme, as config.json will hold it
    layers: list[ConvertedLayer]
    tensors: dict[str, int]  # name -> bytes


class _State(msgspec.Struct):
    job: str  # what is converted, and how
    shards: dict[str, Shard]  # by the source's file name


class Workplace:
    """The hidden folder of one conversion, locked while it is open. Use as a context manager."""

    def __init__(self, destination: Path, job: str, files: Sequence[str]) -> None:
        """`files` are those of the source. Raises ConversionRefused when the destination exists, or when something else
        is being written there."""
        self.destination = destination
        self._names = _names(files)
        self._folder = destination.parent / f".{destination.name}.partial"
        if destination.exists() or destination.is_symlink():
            raise ConversionRefused(f"{destination} exists already: name a new folder, or remove that one first")
        if self._folder.exists() and not (self._folder / STATE).is_file() and any(self._folder.iterdir()):
            raise ConversionRefused(f"{self._folder} is in the way and was not written by a conversion: remove it")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self._folder / LOCK).open("w")
        except OSError as error:
            raise ConversionRefused(
                f"{destination} cannot be written: making {error.filename} failed: {error.strerror}"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ConversionRefused(f"another process is converting to {destination}") from error
        try:
            self._state = self._read_state(job)
        except ConversionRefused:
            self._lock.close()
            raise
        self._write_json(STATE, msgspec.to_builtins(self._state))

    def __enter__(self) -> "Workplace":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """A conversion that was refused can never be finished; anything else may be continued."""
        if kind is not None and issubclass(kind, ValueError):
            shutil.rmtree(self._folder)
        self._lock.close()

    @property
    def shards(self) -> Mapping[str, Shard]:
        """What is finished, by the source's file name."""
        return self._state.shards

    def add(self, file: str, tensors: dict[str, Tensor], shard: Shard) -> None:
        """Write what the source's `file` became; it counts once its record is written. Raises OSError."""
        path = self._folder / self._names[file]
        try:
            save_file(tensors, path.with_suffix(".tmp"), metadata={"format": "pt"})
        except SafetensorError as error:  # no ValueError: what is finished stays, and the conversion may be continued
            raise OSError(f"{path.name} cannot be written: {error}") from error
        os.replace(path.with_suffix(".tmp"), path)
        self._state.shards[file] = shard
        self._write_json(STATE, msgspec.to_builtins(self._state))

    def finish(self, source: Path, config: Mapping[str, Any]) -> None:
        """Copy what is no weight, write config.json and the index, and let the destination appear."""
        for path in source.iterdir():
            if path.is_file() and path.suffix not in NOT_COPIED and not path.name.endswith(".index.json"):
                shutil.copyfile(path, self._folder / path.name)
        if len(self._names) > 1:
            shards = self._state.shards
            total = sum(sum(shard.tensors.values()) for shard in shards.values())
            weight_map = {name: self._names[file] for file, shard in shards.items() for name in shard.tensors}
            self._write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        self._write_json("config.json", config)
        os.rename(self._folder, self.destination)
        for name in (STATE, LOCK):  # a run that ends before this leaves two files that nobody reads
            (self.destination / name).unlink()

    def _read_state(self, job: str) -> _State:
        path = self._folder / STATE
        if not path.is_file():
            return _State(job, {})
        try:
            state = msgspec.json.decode(path.read_bytes(), type=_State)
        except msgspec.DecodeError as error:
            raise ConversionRefused(f"{path} is damaged ({error}): remove {self._folder} to start over") from error
        if state.job != job:
            raise ConversionRefused(
                f"{self._folder} holds a conversion that was interrupted, of another source or with other settings: "
                "finish that one, or remove the folder to start over"
            )
        whole = {file: shard for file, shard in state.shards.items() if (self._folder / self._names[file]).is_file()}
        return _State(job, whole)

    def _write_json(self, name: str, content: Any) -> None:
        temporary = self._folder / f"{name}.tmp"
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, self._folder / name)


def _names(files: Sequence[str]) -> dict[str, str]:
    """The source's file -> the destination's."""
    if len(files) == 1:
        return {files[0]: MAIN}
    return {file: f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i, file in enumerate(files)}
