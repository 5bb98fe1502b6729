"""The header of a GGUF file: settings by name, and where every tensor lies. Imports no torch: the server reads it too.

    "GGUF"  version u32  num_tensors u64  num_settings u64
    settings  name, type u32, value                   strings are a length u64 and UTF-8; arrays a type, a count, values
    tensors   name, num_dims u32, dims u64 each (innermost first), type u32, offset u64 (from the data's start)
    padding to general.alignment (32), then the data

Every count and length is checked against the bytes that are left before anything of its size is made.
"""

import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoint.errors import FilesError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS = 4
MIN_ALIGNMENT, MAX_ALIGNMENT = 8, 1 << 20
DEFAULT_ALIGNMENT = 32
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # type -> struct
MIN_SETTING_BYTES = 8 + 4 + 1
MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")


@dataclass(frozen=True)
class BlockType:
    """How ggml packs a type: `weights` neighbours of a row share a block of `num_bytes`."""

    name: str
    weights: int
    num_bytes: int


TYPES = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    20: BlockType("IQ4_NL", 32, 18),
    23: BlockType("IQ4_XS", 256, 136),
    30: BlockType("BF16", 1, 2),
    34: BlockType("TQ1_0", 256, 54),
    35: BlockType("TQ2_0", 256, 66),
    39: BlockType("MXFP4", 32, 17),
}
CODEBOOKS = {16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 29: "IQ1_M"}
NOT_WEIGHTS = {9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"}
UNSERVED = {31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 40: "NVFP4", 41: "Q1_0"}
FIRST_PRIVATE_TYPE = 97  # ids that forks of llama.cpp gave to types of their own


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies. Its shape has the innermost dimension last."""

    shape: tuple[int, ...]
    type: BlockType
    start: int  # byte of the file
    num_bytes: int


class Settings:
    """The settings of a file by name. Raises FilesError naming the setting that is missing or of another kind."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self._values = values

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise FilesError(f"{self.path}: {name} must be an integer, found {_shown(value)}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Finite."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise FilesError(f"{self.path}: {name} must be a finite number, found {_shown(value)}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise FilesError(f"{self.path}: {name} must be true or false, found {_shown(value)}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise FilesError(f"{self.path}: {name} must be a string, found {_shown(value)}")
        return value

    def array(self, name: str, kind: type) -> list[Any]:
        """A list of str, int or float; read from the file at each call."""
        value = self._get(name, None)
        found = value.read() if isinstance(value, _Array) else None
        if found is None or not all(type(item) is kind for item in found):
            raise FilesError(f"{self.path}: {name} must be an array of {kind.__name__}")
        return list(found)

    def _get(self, name: str, default: Any) -> Any:
        value = self._values.get(name, default)
        if value is None:
            raise FilesError(f"{self.path} has no {name}, which the model needs: convert the model again")
        return value


@dataclass(frozen=True)
class Header:
    """What a file says before its data."""

    path: Path
    settings: Settings
    tensors: Mapping[str, StoredTensor]


def read_header(path: Path) -> Header:
    """Raises FilesError when the file is truncated, damaged, of another version, or holds a type that is not served."""
    try:
        with path.open("rb") as file:
            if path.stat().st_size < 24:
                raise FilesError(f"{path} is truncated: it has no whole GGUF header; download it again")
            return _Reader(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)).header()
    except OSError as error:
        raise FilesError(f"{path} cannot be read: {error}") from error


def shard_paths(path: Path) -> tuple[Path, ...]:
    """All files of a split model, the first first; `path` may be any of them. Raises FilesError when one is missing."""
    match = SHARD.fullmatch(path.name)
    if match is None:
        return (path,)
    count = int(match["count"])
    paths = [path.with_name(f"{match['stem']}-{i + 1:05d}-of-{match['count']}.gguf") for i in range(min(count, 10_000))]
    for shard in paths:
        if not shard.is_file():
            raise FilesError(f"{shard} is missing: {path.name} is one of {count} files of a model, and all are needed")
    return tuple(paths)


def read_headers(path: Path) -> tuple[Header, ...]:
    """The headers of a model's files; the first has the model's settings. Raises FilesError."""
    headers = tuple(read_header(shard) for shard in shard_paths(path))
    count = headers[0].settings.integer("split.count", 1) or 1
    if count != len(headers):
        raise FilesError(
            f"{headers[0].path} is one of {count} files, but its name says {len(headers)}: keep the names that end in "
            f"-00001-of-{count:05d}.gguf"
        )
    seen: dict[str, Path] = {}
    for header in headers:
        for name in header.tensors:
            if name in seen:
                raise FilesError(f"tensor {name!r} is in both {seen[name].name} and {header.path.name}")
            seen[name] = header.path
    return headers


@dataclass(frozen=True)
class _Array:
    """An array that is decoded when it is asked for."""

    data: mmap.mmap
    kind: int
    count: int
    start: int

    def read(self) -> list[Any]:
        if self.kind != STRING:
            return list(struct.unpack_from(f"<{self.count}{SCALARS[self.kind]}", self.data, self.start))
        found, at = [], self.start
        for _ in range(self.count):
            (length,) = struct.unpack_from("<Q", self.data, at)
            found.append(self.data[at + 8 : at + 8 + length].decode("utf-8", "replace"))
            at += 8 + length
        return found


class _Reader:
    """Walks a header. Every method raises FilesError where the file ends too early."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._at = 0

    def header(self) -> Header:
        num_tensors, num_settings = self._counts()
        values = self._settings(num_settings)
        settings = Settings(self._path, values)
        placed = [self._tensor() for _ in range(num_tensors)]
        alignment = settings.integer("general.alignment", DEFAULT_ALIGNMENT)
        if not MIN_ALIGNMENT <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self._wrong(f"general.alignment is {alignment}, expected a power of two from {MIN_ALIGNMENT}")
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, StoredTensor] = {}
        for name, shape, kind, offset in placed:
            if name in tensors:
                raise self._wrong(f"tensor {name!r} stands there twice")
            tensors[name] = self._stored(name, shape, kind, start + offset)
            if offset % alignment:
                raise self._wrong(f"tensor {name!r} does not start at a multiple of {alignment} bytes")
        return Header(self._path, settings, tensors)

    def _counts(self) -> tuple[int, int]:
        """Tensors and settings."""
        if self._data[:4] != MAGIC:
            raise self._wrong(f"it starts with {self._data[:4]!r}, not with {MAGIC!r}: it is no GGUF file")
        (version,) = struct.unpack_from("<I", self._data, 4)
        if version & 0xFFFF == 0 and version:
            raise self._wrong("it is big-endian, which is not supported: convert the model on a little-endian machine")
        if version not in VERSIONS:
            raise self._wrong(f"GGUF version {version} is not supported, 2 and 3 are: convert the model again")
        num_tensors, num_settings = struct.unpack_from("<QQ", self._data, 8)
        self._at = 24
        self._check_room(num_settings * MIN_SETTING_BYTES + num_tensors * MIN_TENSOR_BYTES, "as much as it announces")
        return num_tensors, num_settings

    def _settings(self, count: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for _ in range(count):
            name = self._string()
            if name in values:
                raise self._wrong(f"setting {name!r} stands there twice")
            values[name] = self._value(self._number("I"), name)
        return values

    def _value(self, kind: int, name: str) -> Any:
        if kind == STRING:
            return self._string()
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind != ARRAY:
            raise self._wrong(f"setting {name!r} is of type {kind}, which GGUF does not have")
        inner, count = self._number("I"), self._number("Q")
        if inner != STRING and inner not in SCALARS:
            raise self._wrong(f"setting {name!r} is an array of type {inner}, which is not supported")
        array = _Array(self._data, inner, count, self._at)
        if inner != STRING:
            self._skip(count * struct.calcsize(f"<{SCALARS[inner]}"), name)
            return array
        self._check_room(8 * count, name)
        for _ in range(count):
            self._skip(self._number("Q"), name)
        return array

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type id, offset."""
        name, num_dims = self._string(), self._number("I")
        if not 1 <= num_dims <= MAX_DIMS:
            raise self._wrong(f"tensor {name!r} has {num_dims} dimensions, expected 1 to {MAX_DIMS}")
        dims = tuple(self._number("Q") for _ in range(num_dims))
        return name, dims[::-1], self._number("I"), self._number("Q")

    def _stored(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> StoredTensor:
        block = TYPES.get(kind)
        if block is None:
            raise self._wrong(f"tensor {name!r} is of {_refusal(kind)}")
        if min(shape) < 1 or shape[-1] % block.weights:
            raise self._wrong(
                f"tensor {name!r} has shape {list(shape)}, but {block.name} packs {block.weights} a block"
            )
        num_bytes = math.prod(shape) // block.weights * block.num_bytes
        if start + num_bytes > len(self._data):
            raise self._wrong(
                f"tensor {name!r} ends at byte {start + num_bytes:,} of a file of {len(self._data):,}: it is truncated "
                "or damaged; download it again"
            )
        return StoredTensor(shape, block, start, num_bytes)

    def _string(self) -> str:
        length = self._number("Q")
        self._check_room(length, "a string")
        text = self._data[self._at : self._at + length].decode("utf-8", "replace")
        self._at += length
        return text

    def _number(self, code: str) -> Any:
        size = struct.calcsize(f"<{code}")
        self._check_room(size, "its header")
        (value,) = struct.unpack_from(f"<{code}", self._data, self._at)
        self._at += size
        return value

    def _skip(self, num_bytes: int, what: str) -> None:
        self._check_room(num_bytes, what)
        self._at += num_bytes

    def _check_room(self, num_bytes: int, what: str) -> None:
        if num_bytes > len(self._data) - self._at:
            raise self._wrong(f"it is too short for {what}: it is truncated or damaged; download it again")

    def _wrong(self, reason: str) -> FilesError:
        return FilesError(f"{self._path} cannot be served: {reason}")


def _refusal(kind: int) -> str:
    """The type, and why it is not served."""
    if kind in CODEBOOKS:
        return (
            f"type {CODEBOOKS[kind]}: a codebook type that is not served; use a file of Q2_K or a larger type, or "
            "requantize the original model to one"
        )
    if kind in NOT_WEIGHTS:
        return f"type {NOT_WEIGHTS[kind]}, in which no weights are served"
    if kind in UNSERVED:
        return f"type {UNSERVED[kind]}, which is not served; convert or download the model in another type"
    if kind >= FIRST_PRIVATE_TYPE:
        return f"type {kind}, which llama.cpp does not define: a fork's own; quantize the model with llama.cpp"
    return f"type {kind}, which is not known; supported are {', '.join(block.name for block in TYPES.values())}"


def _shown(value: Any) -> str:
    return "an array" if isinstance(value, _Array) else repr(value)[:80]
