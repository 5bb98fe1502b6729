"""The container for every format that has none of its own: sums of terms between transforms, module by module.

An ordinary Hugging Face folder. config.json holds

    "quantization_config": {
      "quant_method": "nibble",
      "version": 1,
      "schemes": {"0": {"terms": [{"family": "affine", "bits": 4, "group_size": 64, "zero": 8}],
                        "pre": [{"kind": "hadamard", "block": 32}], "post": []}},
      "modules": {"model.layers.0.self_attn.q_proj": "0", ...},
      "made_by": "what and with which options, for people"
    }

and safetensors hold `<module>.terms.<i>.<part>`, `<module>.pre.<i>.<part>`, `<module>.post.<i>.<part>` and
`<module>.bias`; terms.py lists the parts. Modules that are not listed are dense. A field that is not known, and another
version, is refused: both may change what the weights mean.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from engine.checkpoint.errors import CheckpointError, FormatRefused, TensorError
from engine.checkpoint.linear import read_bias, read_dense
from engine.checkpoint.source import Source
from engine.checkpoint.terms import Step, Tensors, Term, of_term, of_transform
from kernels.linear.transforms import Transform
from kernels.linear.weights import LinearWeights

METHOD = "nibble"
VERSION = 1
WHERE = "nibble config"


class Scheme(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one or many modules are stored."""

    terms: tuple[Term, ...]
    pre: tuple[Step, ...] = ()
    post: tuple[Step, ...] = ()


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole quantization_config."""

    quant_method: str
    version: int
    schemes: dict[str, Scheme]
    modules: dict[str, str]  # module -> scheme
    made_by: str = ""  # for people


@dataclass(frozen=True)
class Container:
    """The reader of the container."""

    settings: Settings
    name: str = METHOD

    def describe(self) -> str:
        return f"Nibble container, {self.settings.made_by}" if self.settings.made_by else "Nibble container"

    def linear(self, source: Source, name: str, shape: tuple[int, int], bias: bool) -> LinearWeights:
        if name not in self.settings.modules:
            return read_dense(source, name, shape, bias)
        scheme = self.settings.schemes[self.settings.modules[name]]
        try:
            return LinearWeights(
                terms=tuple(term.read(source, f"{name}.terms.{i}", shape) for i, term in enumerate(scheme.terms)),
                pre=_read_steps(scheme.pre, source, f"{name}.pre", shape[1]),
                bias=read_bias(source, name, shape[0], bias),
                post=_read_steps(scheme.post, source, f"{name}.post", shape[0]),
            )
        except CheckpointError:
            raise
        except ValueError as error:  # of the families' own checks, which do not know where the tensors lie
            raise TensorError(f"{source.folder}: the tensors of {name!r} make no weights: {error}") from error


def read_config(config: Mapping[str, Any]) -> Container:
    """Build the reader from a quantization config. Raises FormatRefused naming the field that is not supported."""
    version = config.get("version")
    if version != VERSION:
        raise FormatRefused(
            f"{WHERE}: version {version!r} is not supported, only {VERSION} is: a newer release of Nibble may read it"
        )
    try:
        settings = msgspec.convert(dict(config), Settings)
    except msgspec.ValidationError as error:
        raise FormatRefused(f"{WHERE}: {error}") from error
    for module, key in settings.modules.items():
        if key not in settings.schemes:
            raise FormatRefused(f"{WHERE}: module {module!r} names the scheme {key!r}, which is not among `schemes`")
    for key, scheme in settings.schemes.items():
        if not scheme.terms:
            raise FormatRefused(f"{WHERE}: scheme {key!r} has no terms")
    return Container(settings)


def write_layer(name: str, weights: LinearWeights) -> tuple[Scheme, Tensors]:
    """What the container holds of a layer: its scheme, and its tensors by full name.

    Raises TypeError for a family or a transform that the container has no name for.
    """
    tensors: Tensors = {}

    def add(kind: str, of: Any, items: tuple[Any, ...]) -> tuple[Any, ...]:
        settings = []
        for i, item in enumerate(items):
            setting, parts = of(item)
            settings.append(setting)
            tensors.update({f"{name}.{kind}.{i}.{part}": tensor for part, tensor in parts.items()})
        return tuple(settings)

    scheme = Scheme(
        add("terms", of_term, weights.terms),
        add("pre", of_transform, weights.pre),
        add("post", of_transform, weights.post),
    )
    if weights.bias is not None:
        tensors[f"{name}.bias"] = weights.bias
    return scheme, {key: tensor.contiguous() for key, tensor in tensors.items()}


def write_settings(layers: Mapping[str, Scheme], made_by: str) -> dict[str, Any]:
    """The quantization_config of these layers, equal schemes told once."""
    keys: dict[Scheme, str] = {}
    modules = {name: keys.setdefault(scheme, str(len(keys))) for name, scheme in layers.items()}
    settings = Settings(METHOD, VERSION, {key: scheme for scheme, key in keys.items()}, modules, made_by)
    converted: dict[str, Any] = msgspec.to_builtins(settings)
    return converted


def _read_steps(steps: tuple[Step, ...], source: Source, at: str, width: int) -> tuple[Transform, ...]:
    return tuple(step.read(source, f"{at}.{i}", width) for i, step in enumerate(steps))
