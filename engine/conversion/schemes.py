"""The names of methods: "rtn:b4:g64:asym" -> an encoder. Adding a method means one file and one line in METHODS."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor

from engine.conversion.blocks import MxFp4, MxInt8, Nv4
from engine.conversion.encoder import ConversionRefused, Encoder
from engine.conversion.ptqtp import Ptqtp
from engine.conversion.rtn import Rtn
from engine.conversion.svd import LowRank
from kernels.linear.transforms import Hadamard
from kernels.linear.weights import LinearWeights

OPTION = re.compile(r"([a-z]+)(\d*)")
ROTATION = "h"  # of every method


@dataclass(frozen=True)
class Method:
    """How a method is made from its options."""

    make: Callable[..., Encoder]
    numbers: Mapping[str, str] = field(default_factory=dict)  # "b" of b4 -> the argument
    words: Mapping[str, tuple[str, Any]] = field(default_factory=dict)  # "asym" -> the argument and its value


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "rtn": Method(
            Rtn,
            {"b": "bits", "g": "group_size"},
            {"sym": ("symmetric", True), "asym": ("symmetric", False), "clip": ("clip", True)},
        ),
        "mxint8": Method(MxInt8),
        "mxfp4": Method(MxFp4),
        "nvint4": Method(partial(Nv4, "int")),
        "nvfp4": Method(partial(Nv4, "fp")),
        "ptqtp": Method(Ptqtp, {"g": "group_size"}),
        "lowrank": Method(LowRank, {"p": "percent"}),
    }
)


@dataclass(frozen=True)
class Rotated:
    """Any method on W H, its input turned by H: outliers are spread over their block of channels."""

    inner: Encoder
    hadamard: Hadamard

    def encode(self, weight: Tensor) -> LinearWeights:
        if weight.shape[1] % self.hadamard.block:
            raise ConversionRefused(
                f"{weight.shape[1]} channels are not whole Hadamard blocks of {self.hadamard.block}"
            )
        encoded = self.inner.encode(self.hadamard.apply(weight.float()))
        return replace(encoded, pre=(self.hadamard, *encoded.pre))


def read_scheme(text: str) -> Encoder:
    """ "rtn:b4:g64:asym:clip", "mxint8", "nvint4:h32", "ptqtp:g128", "lowrank:p90". Raises ConversionRefused."""
    name, *options = text.split(":")
    if name not in METHODS:
        raise ConversionRefused(f"--scheme {text!r}: there is no method {name!r}; there are {', '.join(METHODS)}")
    method, arguments, block = METHODS[name], dict[str, Any](), 0
    for option in options:
        match = OPTION.fullmatch(option)
        letter, digits = match.groups() if match else ("", "")
        if option in method.words:
            argument, value = method.words[option]
        elif letter in method.numbers and digits:
            argument, value = method.numbers[letter], int(digits)
        elif letter == ROTATION and digits:
            argument, value = ROTATION, int(digits)
        else:
            known = [*(f"{letter}N" for letter in method.numbers), *method.words, f"{ROTATION}N"]
            raise ConversionRefused(f"--scheme {text!r}: {name} has no option {option!r}; it has {', '.join(known)}")
        if argument in arguments:
            raise ConversionRefused(f"--scheme {text!r}: {option!r} contradicts what stands before it")
        arguments[argument] = value
    block = arguments.pop(ROTATION, 0)
    try:
        encoder = method.make(**arguments)
        return Rotated(encoder, Hadamard(block)) if block else encoder
    except ValueError as error:
        raise ConversionRefused(f"--scheme {text!r}: {error}") from error
