"""A folder of safetensors files as one table of tensors, memory-mapped: reading a tensor copies nothing.

Files are found as users have them, in this order: one ``model.safetensors``; shards named by an index; one or several
files of other names. Pickled files are never opened.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.checkpoint.errors import FilesError, TensorError
from engine.checkpoint.mapping import MappedFiles

Progress = Callable[[int, int], None]  # bytes read so far, bytes in all

MAIN_FILE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth")
HOW_TO_CONVERT = (
    "pickled files can run code when opened and are never read. Convert the checkpoint once, on a machine where you "
    "trust it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder, safe_serialization=True)"
)
OTHER_MODELS = re.compile(r"(consolidated|adapter_model|expected|kvcal).*\.safetensors$")  # beside a model, not of it
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}
# What old releases saved although it is computed, not learned.
IGNORABLE = (r".*rotary_emb\.inv_freq", r".*\.attn\.(masked_)?bias")


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]  # tensor -> file


class Source:
    """The tensors of one checkpoint folder. Remembers which were read, so that none is silently left over.

    Opening reads headers only. Raises FilesError when the files are missing, pickled, broken or contradictory.
    """

    def __init__(self, folder: Path, on_progress: Progress | None = None) -> None:
        self.folder = folder
        self._on_progress = on_progress
        self._handles: dict[str, Any] = {}  # file -> safetensors handle
        self._file_of: dict[str, str] = {}  # tensor -> file
        self._read: set[str] = set()
        self._handed_out: list[tuple[Path, Tensor]] = []  # since the last release
        self._mapped = MappedFiles()
        self._open_all()
        self.total_bytes = sum(self.num_bytes(name) for name in self._file_of)
        self.read_bytes = 0

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files. Tensors already read stay valid."""
        self._handed_out.clear()
        self._handles.clear()
        self._mapped = MappedFiles()

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def names(self) -> tuple[str, ...]:
        """Every tensor, shard by shard."""
        return tuple(self._file_of)

    def shards(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Each file with the names of its tensors, in the order in which reading touches the disk once."""
        for file in dict.fromkeys(self._file_of.values()):
            yield file, tuple(name for name, owner in self._file_of.items() if owner == file)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Raises TensorError when torch has no such type."""
        stored: str = self._slice(name).get_dtype()
        if stored not in DTYPES:
            raise TensorError(f"tensor {name!r} has dtype {stored}, which is not supported")
        return DTYPES[stored]

    def metadata(self, name: str) -> dict[str, str]:
        """What the header of the file that holds the tensor `name` says beside its tensors. Raises TensorError."""
        return dict(self._handle(name).metadata() or {})

    def num_bytes(self, name: str) -> int:
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def tensor(self, name: str) -> Tensor:
        """Return a tensor as stored, backed by the file; counts it as read. Raises TensorError when it is missing."""
        tensor: Tensor = self._handle(name).get_tensor(name)
        self._handed_out.append((self.folder / self._file_of[name], tensor))
        if name not in self._read:
            self._read.add(name)
            self.read_bytes += self.num_bytes(name)
            if self._on_progress is not None:
                self._on_progress(self.read_bytes, self.total_bytes)
        return tensor

    def peek(self, name: str) -> Tensor:
        """A tensor as stored, to look at a few of its bytes: does not count as read. Raises TensorError."""
        tensor: Tensor = self._handle(name).get_tensor(name)
        return tensor

    def take(self, name: str, shape: Sequence[int], dtypes: Sequence[torch.dtype] = FLOATS) -> Tensor:
        """Return the tensor `name` if it has this shape and one of these dtypes. Raises TensorError otherwise."""
        if self.shape(name) != tuple(shape):
            raise TensorError(f"tensor {name!r} has shape {list(self.shape(name))}, expected {list(shape)}")
        if self.dtype(name) not in dtypes:
            expected = " or ".join(_name(dtype) for dtype in dtypes)
            raise TensorError(f"tensor {name!r} has dtype {_name(self.dtype(name))}, expected {expected}")
        return self.tensor(name)

    def release(self) -> None:
        """Give back the memory under the tensors handed out so far: they stay valid, and are read again when used.

        What a kernel has repacked would otherwise stay resident beside its source, and the model exist twice.
        """
        self.drop_pages()
        self._handed_out.clear()

    def drop_pages(self) -> None:
        """As `release`, in the middle of reading a large tensor."""
        for path, tensor in self._handed_out:
            self._mapped.drop_pages(tensor, path)

    def unread(self) -> tuple[str, ...]:
        """The tensors nobody read and nobody may ignore."""
        return tuple(
            name
            for name in self._file_of
            if name not in self._read and not any(re.fullmatch(pattern, name) for pattern in IGNORABLE)
        )

    def check_all_read(self, ignore: Sequence[str] = ()) -> None:
        """Raise TensorError when the model left tensors behind; `ignore` are names it may leave (a tied head)."""
        left = [name for name in self.unread() if name not in ignore]
        if left:
            shown = ", ".join(f"{name} {list(self.shape(name))}" for name in left[:3])
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise TensorError(
                f"{self.folder}: the checkpoint holds tensors the model does not use: {shown}{more}. Its config.json "
                "describes another model than its weights, or the architecture has parts that are not supported"
            )

    def json(self, file: str) -> dict[str, Any] | None:
        """The object in a JSON file of the folder, or None when there is no such file. Raises FilesError."""
        path = self.folder / file
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise FilesError(f"{path} cannot be read: {error}") from error
        if not isinstance(content, dict):
            raise FilesError(f"{path} must hold a JSON object, found {type(content).__name__}")
        return content

    def _open_all(self) -> None:
        names_in, index = _find_files(self.folder)
        for file in names_in:
            self._open(file)
        for name, file in index.items():
            if self._file_of.get(name) != file:
                raise FilesError(f"{self.folder}: the index places tensor {name!r} in {file}, which does not hold it")

    def _open(self, file: str) -> None:
        path = self.folder / file
        try:
            handle: Any = safe_open(path, framework="pt")
            names = handle.keys()
        except (SafetensorError, OSError, OverflowError, ValueError) as error:
            raise FilesError(
                f"{path} is not a whole safetensors file ({error}): it is truncated or damaged; download it again"
            ) from error
        self._handles[file] = handle
        for name in names:
            if name in self._file_of:
                raise FilesError(f"{self.folder}: tensor {name!r} is in both {self._file_of[name]} and {file}")
            self._file_of[name] = file

    def _handle(self, name: str) -> Any:
        if name not in self._file_of:
            raise TensorError(f"{self.folder}: the checkpoint has no tensor {name!r}, which the model needs")
        return self._handles[self._file_of[name]]

    def _slice(self, name: str) -> Any:
        return self._handle(name).get_slice(name)


def _find_files(folder: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """The files that make up the model, and the index that names them (empty when there is none)."""
    if not folder.is_dir():
        raise FilesError(f"{folder} is not a folder")
    files = sorted(path.name for path in folder.glob("*.safetensors") if not OTHER_MODELS.match(path.name))
    indexes = sorted(path.name for path in folder.glob("*.safetensors.index.json"))
    if MAIN_FILE in files:
        return (MAIN_FILE,), {}
    if f"{MAIN_FILE}.index.json" in indexes:
        indexes = [f"{MAIN_FILE}.index.json"]
    if len(indexes) > 1:
        raise FilesError(f"{folder} has several indexes and none is {MAIN_FILE}.index.json: {', '.join(indexes)}")
    if indexes:
        return _read_index(folder, indexes[0])
    if files:
        return tuple(files), {}
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise FilesError(f"{folder} holds {pickles[0]} but no safetensors: {HOW_TO_CONVERT}")
    raise FilesError(f"{folder} holds no *.safetensors. If the model only comes as .bin or .pth: {HOW_TO_CONVERT}")


def _read_index(folder: Path, file: str) -> tuple[tuple[str, ...], dict[str, str]]:
    try:
        index = msgspec.json.decode((folder / file).read_bytes(), type=_Index).weight_map
    except (OSError, msgspec.DecodeError, RecursionError) as error:
        raise FilesError(f"{folder / file} is not an index of tensors: {error}") from error
    shards = tuple(sorted(set(index.values())))
    if not shards:
        raise FilesError(f"{folder / file} names no tensor")
    for shard in shards:
        path = PurePosixPath(shard)
        if path.is_absolute() or ".." in path.parts or "\\" in shard or path.suffix != ".safetensors":
            raise FilesError(f"{folder / file} names {shard!r}, which is not a safetensors file inside the folder")
        if not (folder / shard).is_file():
            raise FilesError(f"{folder}: shard {shard}, named by {file}, is missing; download it again")
    return shards, index


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
