"""nibble convert: a checkpoint in 16 or 32 bits -> Nibble's container, shard by shard.

One shard is in memory at a time: its source is mapped and let go layer by layer, its result held until it is written.
"""

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from engine.checkpoint.errors import CheckpointError
from engine.checkpoint.format import detect
from engine.checkpoint.gguf_choice import SUFFIX
from engine.checkpoint.nibble import Scheme, write_layer, write_settings
from engine.checkpoint.source import FLOATS, Source
from engine.conversion.encoder import ConversionRefused, Encoder
from engine.conversion.layers import linear_layers
from engine.conversion.recover import Recovery
from engine.conversion.schemes import read_scheme
from engine.conversion.workplace import Shard, Workplace
from engine.messages import Conversion, ConversionSettings, ConvertedLayer, Loading
from engine.models.config import read_json
from kernels.linear.weights import LinearWeights

OnProgress = Callable[[Loading], None]
WEIGHT = ".weight"


def convert(
    folder: Path, destination: Path, settings: ConversionSettings, on_progress: OnProgress | None = None
) -> Conversion:
    """Write `folder` in Nibble's container to `destination`, which must not exist; it appears when it is whole.

    An interrupted conversion continues when it is started again with the same settings. Raises ConversionRefused,
    CheckpointError or UnsupportedModel (all ValueError) naming the layer, the setting or the folder.
    """
    if folder.suffix == SUFFIX:
        raise ConversionRefused(
            f"{folder} is a GGUF file, which is served as it is (nibble serve {shlex.quote(str(folder))}) and cannot "
            "be converted: give a folder with the model's safetensors and config.json"
        )
    encoder = Recovery() if settings.scheme is None else read_scheme(settings.scheme)
    config = read_json(folder)
    layers = linear_layers(folder)
    with Source(folder, _heard(on_progress)) as source:
        found = detect(config, source)
        if found.name != "dense":
            raise ConversionRefused(f"{folder} is quantized already ({found.describe()}): it can be served as it is")
        job = _Job(source, layers, _kept(settings.keep, layers), encoder)
        missing = [name for name in layers if f"{name}{WEIGHT}" not in source]
        if missing:
            raise ConversionRefused(f"{folder}: the checkpoint has no tensor {missing[0] + WEIGHT!r}")
        files = [file for file, _ in source.shards()]
        with Workplace(destination, _describe_job(folder, source, settings), files) as place:
            resumed = len(place.shards)
            for file, names in source.shards():
                if file in place.shards:
                    job.skip(names)
                else:
                    tensors, shard = job.shard(names)
                    place.add(file, tensors, shard)
                    del tensors  # before the next shard is made
            made_by = _made_by(settings)
            shards = [place.shards[file] for file in files]
            schemes = {name: scheme for shard in shards for name, scheme in shard.schemes.items()}
            decoded = {name: msgspec.convert(scheme, Scheme) for name, scheme in schemes.items()}
            quantization = {"quantization_config": write_settings(decoded, made_by)}
            place.finish(folder, config | quantization)
        return Conversion(
            source=str(folder),
            destination=str(destination),
            made_by=made_by,
            layers=[layer for shard in shards for layer in shard.layers],
            source_bytes=source.total_bytes,
            num_bytes=sum(sum(shard.tensors.values()) for shard in shards),
            num_shards=len(shards),
            num_resumed=resumed,
        )


@dataclass(frozen=True)
class _Job:
    """What becomes of the tensors of one checkpoint."""

    source: Source
    layers: dict[str, tuple[int, int]]  # linear layer -> (out_features, in_features)
    kept: frozenset[str]  # of these, what stays as it is
    encoder: Encoder

    def shard(self, names: tuple[str, ...]) -> tuple[dict[str, Tensor], Shard]:
        """Encode the linear layers among the tensors `names`, copy the others."""
        tensors: dict[str, Tensor] = {}
        schemes: dict[str, Any] = {}
        reports: list[ConvertedLayer] = []
        for name in names:
            layer = name.removesuffix(WEIGHT)
            if layer not in self.layers or layer == name:
                tensors[name] = self.source.tensor(name)
                continue
            weight = self.source.take(name, self.layers[layer], FLOATS)
            if layer in self.kept:
                tensors[name] = weight
                reports.append(ConvertedLayer(layer, "kept", weight.numel(), _num_bytes({name: weight}), 0.0))
                continue
            scheme, stored, report = self._encode(layer, weight)
            tensors.update(stored)
            schemes[layer] = msgspec.to_builtins(scheme)
            reports.append(report)
            self.source.release()
        return tensors, Shard(schemes, reports, {name: _num_bytes({name: t}) for name, t in tensors.items()})

    def skip(self, names: tuple[str, ...]) -> None:
        """Count tensors that an earlier run has done; reading them maps a file and touches nothing."""
        for name in names:
            self.source.tensor(name)
        self.source.release()

    def _encode(self, layer: str, weight: Tensor) -> tuple[Scheme, dict[str, Tensor], ConvertedLayer]:
        if not bool(weight.isfinite().all()):
            raise ConversionRefused(f"layer {layer!r} holds a weight that is not finite")
        try:
            encoded = self.encoder.encode(weight)
        except CheckpointError:
            raise
        except ValueError as error:
            raise ConversionRefused(f"layer {layer!r} cannot be converted: {error}") from error
        error_of = _relative_error(encoded, weight)
        if error_of != 0 and isinstance(self.encoder, Recovery):
            raise AssertionError(f"recovery changed the weights of {layer!r}")
        scheme, stored = write_layer(layer, encoded)
        return scheme, stored, ConvertedLayer(layer, encoded.describe(), weight.numel(), _num_bytes(stored), error_of)


def _relative_error(encoded: LinearWeights, weight: Tensor) -> float:
    """|W' - W| / |W|, 0 when both are the same in W's dtype."""
    matrix = encoded.dequantize()
    if torch.equal(matrix.to(weight.dtype), weight):
        return 0.0
    norm = float(weight.float().norm())
    return float((matrix - weight.float()).norm()) / norm if norm else 0.0


def _kept(patterns: tuple[str, ...], layers: dict[str, tuple[int, int]]) -> frozenset[str]:
    """The layers whose whole name a pattern matches. Raises ConversionRefused for a pattern that matches none."""
    kept: set[str] = set()
    for text in patterns:
        try:
            matching = {name for name in layers if re.fullmatch(text, name)}
        except re.error as error:
            raise ConversionRefused(f"--keep {text!r} is not a regular expression: {error}") from error
        if not matching:
            raise ConversionRefused(f"--keep {text!r} matches no linear layer; the first is {next(iter(layers))!r}")
        kept |= matching
    return frozenset(kept)


def _made_by(settings: ConversionSettings) -> str:
    return "recovered" if settings.scheme is None else settings.scheme


def _describe_job(folder: Path, source: Source, settings: ConversionSettings) -> str:
    """What must be equal for a conversion to continue another: the files, to the nanosecond, and the settings."""
    files = []
    for file, _ in source.shards():
        stat = (folder / file).stat()
        files.append([file, stat.st_size, stat.st_mtime_ns])
    return json.dumps([str(folder.resolve()), files, msgspec.to_builtins(settings)])


def _num_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _heard(on_progress: OnProgress | None) -> Callable[[int, int], None] | None:
    return None if on_progress is None else lambda done, total: on_progress(Loading(done, total))
