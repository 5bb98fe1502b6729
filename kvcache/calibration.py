"""The artifact a calibrated checkpoint ships: kvcal.safetensors, read, checked and written.

One metadata entry, "kvcal", is JSON (`Header`); the tensors, for L layers, H kv heads of D channels in groups of g:

    k_perm  v_perm   [L, H, D] int16         x'[c] = x[perm[c]], inside each head
    k_clip  v_clip   [L, H, D / g] float16   alpha, above 0 and at most 1; 1 where a layer has 16 bits
    k_ps    v_ps     [L, H] float32          prescales, powers of two
    k_mean  k_scale  [L, H, D] float32       keys become (k - mean) scale, queries q / scale, before all else; scales
                                             are powers of two
    k_rot   v_rot    [L, H, D, D] float32    optional orthogonal matrices, applied after all else

All of it acts on what is stored: keys after RoPE, and values. Nothing is folded into the weights.
"""

import os
from dataclasses import dataclass, fields
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import msgspec
import safetensors
import safetensors.torch
import torch
from torch import Tensor

FILE_NAME = "kvcal.safetensors"
METADATA_KEY = "kvcal"
DIGEST_BYTES = 16
LARGEST_DEVIATION = 1e-3  # of a rotation times its transpose from the identity: what it would change scores by


class CalibrationError(ValueError):
    """The artifact is missing, damaged or was made for something else; the message says which and what to do."""


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the artifact is for and where it came from."""

    format: Literal["kvcal/1"]
    fingerprint: str  # of the model; the engine computes it
    num_layers: int  # L
    num_kv_heads: int  # H
    head_dim: int  # D
    group_size: int  # g
    bits: tuple[tuple[float, float], ...]  # of keys and values in each layer
    hadamard: tuple[tuple[bool, bool], ...]  # whether keys and values of each layer turn after the permutation
    rope: Literal["after"]  # what is described are keys after RoPE
    clip_mode: Literal["mid", "origin"]
    parameters: Literal["e4m3"]  # of scales and zeros; float16 at 8 bits
    window: int  # W and S that the search assumed
    num_sinks: int
    provenance: str  # the data it was calibrated on


@dataclass(frozen=True)
class Calibration:
    """A checked artifact."""

    header: Header
    k_perm: Tensor
    v_perm: Tensor
    k_clip: Tensor
    v_clip: Tensor
    k_ps: Tensor
    v_ps: Tensor
    k_mean: Tensor
    k_scale: Tensor
    k_rot: Tensor | None = None
    v_rot: Tensor | None = None

    def __post_init__(self) -> None:
        """Raises CalibrationError, naming the tensor."""
        header, held = self.header, self.tensors()
        if header.group_size < 1 or header.head_dim % header.group_size:
            raise CalibrationError(f"groups of {header.group_size} do not divide heads of {header.head_dim} channels")
        for name, given in (("bits", header.bits), ("hadamard", header.hadamard)):
            if len(given) != header.num_layers:
                raise CalibrationError(f"{name} are given for {len(given)} layers of {header.num_layers}")
        for name, tensor in held.items():
            dtype, shape = _expected(name, header)
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                found = f"{tensor.dtype} {list(tensor.shape)}"
                raise CalibrationError(f"tensor {name} is {found}, expected {dtype} {list(shape)}")
            wrong = _what_is_wrong(name, tensor, header)
            if wrong is not None:
                raise CalibrationError(f"tensor {name} {wrong}")

    @cached_property
    def digest(self) -> str:
        """A name for the content, part of what names a page: other clips make other pages of the same tokens."""
        content = blake2b(msgspec.json.encode(self.header), digest_size=DIGEST_BYTES)
        for name, tensor in sorted(self.tensors().items()):
            content.update(name.encode())
            content.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return content.hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "header"}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write the artifact, whole or not at all; the same calibration gives the same bytes. Raises CalibrationError."""
    metadata = {METADATA_KEY: msgspec.json.encode(calibration.header).decode()}
    tensors = {name: tensor.contiguous() for name, tensor in calibration.tensors().items()}
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(safetensors.torch.save(tensors, metadata))
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise CalibrationError(f"{path} cannot be written: {error.strerror}") from error


def read_calibration(path: Path, fingerprint: str) -> Calibration:
    """Read and check the artifact of the model with this fingerprint. Raises CalibrationError."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, safetensors.SafetensorError) as error:
        raise CalibrationError(f"{path} cannot be read: {error}") from error
    if METADATA_KEY not in metadata:
        raise CalibrationError(f"{path} is not a calibration artifact: it has no metadata {METADATA_KEY!r}")
    try:
        header = msgspec.json.decode(metadata[METADATA_KEY], type=Header)
    except msgspec.DecodeError as error:
        raise CalibrationError(f"{path} has damaged metadata, or comes from another version: {error}") from error
    if header.fingerprint != fingerprint:
        raise CalibrationError(
            f"{path} was made for a model with fingerprint {header.fingerprint}, this one has {fingerprint}: calibrate "
            "this model, or remove the file"
        )
    known = {field.name for field in fields(Calibration)} - {"header"}
    required = {field.name for field in fields(Calibration) if field.default is not None} - {"header"}
    for problem, names in (("lacks", required - tensors.keys()), ("has unknown", tensors.keys() - known)):
        if names:
            raise CalibrationError(f"{path} {problem} tensors: {', '.join(sorted(names))}")
    try:
        return Calibration(header, **tensors)
    except CalibrationError as error:
        raise CalibrationError(f"{path}: {error}") from error


def _expected(name: str, header: Header) -> tuple[torch.dtype, tuple[int, ...]]:
    heads, dim = (header.num_layers, header.num_kv_heads), header.head_dim
    return {
        "perm": (torch.int16, (*heads, dim)),
        "clip": (torch.float16, (*heads, dim // header.group_size)),
        "ps": (torch.float32, heads),
        "mean": (torch.float32, (*heads, dim)),
        "scale": (torch.float32, (*heads, dim)),
        "rot": (torch.float32, (*heads, dim, dim)),
    }[name.split("_")[1]]


def _what_is_wrong(name: str, tensor: Tensor, header: Header) -> str | None:
    """What no tensor of this name may hold, of the right shape as it is."""
    match name.split("_")[1]:
        case "perm" if not torch.equal(tensor.sort(-1).values, _channels(header).expand(tensor.shape)):
            return f"is not a permutation of the {header.head_dim} channels in every head"
        case "clip" if not bool(((tensor > 0) & (tensor <= 1)).all()):
            return "must be above 0 and at most 1"
        case "ps" | "scale" if not bool((tensor > 0).all()) or bool((torch.frexp(tensor).mantissa != 0.5).any()):
            return "must hold powers of two"
        case "mean" if not bool(tensor.isfinite().all()):
            return "must be finite"
        case "rot" if not _is_orthogonal(tensor):
            return "is not orthogonal: attention would change"
    return None


def _channels(header: Header) -> Tensor:
    return torch.arange(header.head_dim, dtype=torch.int16)


def _is_orthogonal(matrices: Tensor) -> bool:
    identity = torch.eye(matrices.shape[-1])
    return bool(((matrices @ matrices.mT - identity).abs() <= LARGEST_DEVIATION).all())
