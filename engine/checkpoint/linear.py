"""What the readers share: dense layers, biases, and settings that are honoured or refused by name."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import torch
from torch import Tensor

from engine.checkpoint.errors import FormatRefused, TensorError
from engine.checkpoint.source import FLOATS, Source
from kernels.linear.dense.layout import DenseWeights
from kernels.linear.weights import LinearWeights

Settings = TypeVar("Settings", bound=msgspec.Struct)
# Of re.compile; the last two come of numbers and brackets without end.
PATTERN_ERRORS = (re.error, OverflowError, RecursionError)
NEUTRAL: tuple[Any, ...] = (None, False, 0, "", [], {})  # values by which a setting says that it is off


def read_dense(source: Source, name: str, shape: tuple[int, int], bias: bool) -> LinearWeights:
    """The layer `name` as it is stored, in its own dtype; shape is (out_features, in_features). Raises TensorError."""
    weight = source.take(f"{name}.weight", shape)
    return LinearWeights((DenseWeights(weight),), bias=read_bias(source, name, shape[0], bias))


def read_bias(source: Source, name: str, out_features: int, wanted: bool) -> Tensor | None:
    """The bias [out_features], or None when the model has none. Raises TensorError.

    AutoGPTQ gives every layer a bias of zeros; it may be there unwanted, any other may not.
    """
    key = f"{name}.bias"
    if not wanted and key not in source:
        return None
    bias = source.take(key, (out_features,))
    if wanted:
        return check_finite(bias, key)
    if bias.any():
        raise TensorError(f"tensor {key!r} is not zero, but the model's config says that this layer has no bias")
    return None


def take_scales(source: Source, key: str, shape: Sequence[int], dtypes: Sequence[torch.dtype] = FLOATS) -> Tensor:
    """Return scales as they are stored. Raises TensorError, also when one is NaN or infinite."""
    scales = source.take(key, shape, dtypes)
    if not bool(scales.float().isfinite().all()):
        raise TensorError(f"tensor {key!r} holds scales that are not finite")
    return scales


def take_scalar(source: Source, key: str) -> Tensor:
    """One positive number, stored with shape [] or [1] -> [1] float32. Raises TensorError."""
    stored = take_scales(source, key, () if source.shape(key) == () else (1,)).float().view(1)
    if float(stored) <= 0:
        raise TensorError(f"tensor {key!r} is {float(stored)}, expected a positive scale")
    return stored


def check_finite(tensor: Tensor, name: str) -> Tensor:
    """The scales or zero points `tensor`, of the tensor `name`. Raises TensorError when one is infinite or NaN."""
    if not bool(tensor.isfinite().all()):
        raise TensorError(f"tensor {name!r} holds values that are not finite: the file is damaged, download it again")
    return tensor


def is_packed(source: Source, name: str, part: str) -> bool:
    """Whether the layer is stored as `part` (quantized), not as `weight`. Raises TensorError when it is neither."""
    if f"{name}.{part}" in source:
        return True
    if f"{name}.weight" in source:
        return False
    raise TensorError(f"{source.folder}: the checkpoint has neither {name}.{part} nor {name}.weight")


def present(source: Source, name: str, parts: Collection[str]) -> tuple[str, ...]:
    """Those of the layer's `parts` that the checkpoint holds, as full tensor names."""
    return tuple(key for key in (f"{name}.{part}" for part in parts) if key in source)


def rename(config: Mapping[str, Any], synonyms: Mapping[str, str], where: str) -> dict[str, Any]:
    """Replace old names of settings. Raises FormatRefused when a setting stands there twice and differs."""
    settings: dict[str, Any] = {}
    for field, value in config.items():
        if value is None:
            continue
        name = synonyms.get(field, field)
        if settings.setdefault(name, value) != value:
            raise FormatRefused(f"{where}: {field} = {value!r} contradicts {name} = {settings[name]!r}")
    return settings


def read_settings(
    config: Mapping[str, Any], kind: type[Settings], informational: Collection[str], where: str
) -> Settings:
    """Check a quantization config against the fields of `kind`, which are honoured.

    A field that is null is unset. `informational` fields say how the weights were made, not what they mean, and are
    skipped; any other field must be off. Raises FormatRefused naming the field, and `where` it stands.
    """
    honoured = {field.name for field in msgspec.structs.fields(kind)}
    for field, value in config.items():
        if field not in honoured and field not in informational and value not in NEUTRAL:
            raise FormatRefused(
                f"{where}: {field} = {value!r} is not supported. If it does not change what the stored weights mean, "
                "remove it from the config"
            )
    try:
        return msgspec.convert({key: config[key] for key in honoured if config.get(key) is not None}, kind)
    except msgspec.ValidationError as error:
        raise FormatRefused(f"{where}: {error}") from error
