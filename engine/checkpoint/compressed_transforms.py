"""transform_config of compressed-tensors: rotations of a layer's input or output that are left to the server.

    input     y = W (x R)        output     y = (W x + bias) R        each run of b channels by the same b x b matrix

Rotations of weights are in the weights already. Those of queries and keys (k_cache, q_attn) are refused. The matrix is
the deterministic Hadamard one unless the checkpoint stores it, under <layer>.<name>_<location>.weight; layers that
share a matrix may store it once.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from engine.checkpoint.errors import FormatRefused, TensorError
from engine.checkpoint.linear import PATTERN_ERRORS, read_settings
from engine.checkpoint.source import FLOATS, Source
from kernels.linear.transforms import BlockRotation, Hadamard, Transform
from kernels.linear.weights import LinearWeights

STORED = (*FLOATS, torch.float64)
LINEAR = "Linear"  # the class that targets every layer
IN_THE_WEIGHTS = ("weight_input", "weight_output")


class _Scheme(msgspec.Struct, frozen=True):
    type: Literal["hadamard", "random-hadamard", "random-matrix"]
    apply: list[dict[str, Any]]
    randomize: bool = False
    head_dim: int | None = None


class _Place(msgspec.Struct, frozen=True):
    targets: list[str] | str
    location: str
    inverse: bool = False
    ignore: list[str] | str = ()  # type: ignore[assignment]


@dataclass(frozen=True)
class Rotation:
    """One matrix and where it goes."""

    name: str
    is_computed: bool  # from the size alone, where the checkpoint stores no matrix
    block: int | None  # None: the whole width
    targets: tuple[str, ...]
    ignore: tuple[str, ...]
    location: str  # "input" or "output"
    inverse: bool

    def holds_for(self, layer: str) -> bool:
        return any(matches(layer, target) for target in self.targets) and not any(
            matches(layer, ignored) for ignored in self.ignore
        )

    def transform(self, source: Source, layer: str, width: int) -> Transform:
        """The rotation of `width` channels of a layer. Raises TensorError when its matrix is missing or no rotation."""
        size = self.block or width
        if width % size:
            raise TensorError(f"{layer}: {width} channels are not whole blocks of {size}, which {self.name} rotates")
        stored = self._stored(source, layer, size)
        if stored is not None:
            matrix = source.take(stored, (size, size), STORED).double() / math.sqrt(size)
            if not torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-2):
                raise TensorError(f"tensor {stored!r} is not sqrt({size}) times a rotation")
            if self.is_computed and not size & (size - 1) and torch.equal(matrix, hadamard(size)):
                return Hadamard(size)
            applied = matrix if self.inverse else matrix.T  # x R, of rows, is R^T x
            return BlockRotation(applied.float().contiguous().unsqueeze(0))
        if not self.is_computed:
            raise TensorError(f"{layer}: the checkpoint stores no matrix for its transform {self.name!r}")
        if size & (size - 1):
            raise TensorError(
                f"{layer}: the Hadamard matrix of size {size} is not in the checkpoint, and only those of "
                "powers of two can be computed"
            )
        return Hadamard(size)

    def _stored(self, source: Source, layer: str, size: int) -> str | None:
        """The layer's own matrix, else one of this transform and size that another layer stores."""
        part = f".{self.name}_{self.location}.weight"
        if layer + part in source:
            return layer + part
        return next((key for key in source.names() if key.endswith(part) and source.shape(key) == (size, size)), None)


@dataclass(frozen=True)
class Rotations:
    """All that the server has to apply."""

    all: tuple[Rotation, ...] = ()

    def describe(self) -> str:
        return ", rotated" if self.all else ""

    def around(self, source: Source, layer: str, weights: LinearWeights) -> LinearWeights:
        """The layer with its rotations: of the input before anything else, of the output after it."""
        pre: list[Transform] = []
        post: list[Transform] = []
        for rotation in self.all:
            if rotation.holds_for(layer):
                is_input = rotation.location == "input"
                width = weights.in_features if is_input else weights.out_features
                (pre if is_input else post).append(rotation.transform(source, layer, width))
        bias = weights.bias
        if bias is not None and post:  # it is rotated with the output; ours is added behind
            turned = bias.float().unsqueeze(0)
            for transform in post:
                turned = transform.apply(turned)
            bias = turned.squeeze(0)
        return replace(weights, pre=(*pre, *weights.pre), post=(*weights.post, *post), bias=bias)


def read_rotations(config: Mapping[str, Any], where: str) -> Rotations:
    """The rotations to apply. Raises FormatRefused naming what cannot be."""
    groups = config.get("config_groups") or {}
    unknown = [key for key in config if key != "config_groups"]
    if unknown or not isinstance(groups, Mapping):
        raise FormatRefused(f"{where}: expected config_groups and nothing else, found {', '.join(config)}")
    rotations: list[Rotation] = []
    for name, group in groups.items():
        scheme = read_settings(group, _Scheme, ("precision", "requires_grad"), f"{where}.{name}")
        for place in scheme.apply:
            rotation = _rotation(name, scheme, read_settings(place, _Place, (), f"{where}.{name}.apply"), where)
            rotations += [] if rotation is None else [rotation]
    return Rotations(tuple(rotations))


def _rotation(name: str, scheme: _Scheme, place: _Place, where: str) -> Rotation | None:
    if place.location in IN_THE_WEIGHTS:
        return None
    if place.location not in ("input", "output"):
        raise FormatRefused(
            f"{where}.{name}: location {place.location!r} is not supported: rotations of queries and keys are not "
            "served. Quantize without them"
        )
    targets, ignore = ((given,) if isinstance(given, str) else tuple(given) for given in (place.targets, place.ignore))
    for pattern in (*targets, *ignore):
        check_pattern(pattern, f"{where}.{name}")
    computed = scheme.type == "hadamard" and not scheme.randomize
    return Rotation(name, computed, scheme.head_dim, targets, ignore, place.location, place.inverse)


def matches(layer: str, target: str) -> bool:
    """Whether a target names the linear layer: by its name, by a pattern from its start, or by its class."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), layer) is not None
    return target in (layer, LINEAR)


def check_pattern(target: str, where: str) -> None:
    """Raises FormatRefused for a target that is no regular expression."""
    try:
        re.compile(target.removeprefix("re:"))
    except PATTERN_ERRORS as error:
        raise FormatRefused(f"{where}: {target[:80]!r} is not a regular expression: {error}") from error


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix, [size, size] float64, divided by sqrt(size)."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)
