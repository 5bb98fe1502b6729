"""What a conversion would end in, said before it takes its minutes: layers that no fast kernel serves."""

from pathlib import Path

import torch

from engine.checkpoint.gguf_choice import SUFFIX
from engine.conversion.layers import linear_layers
from engine.conversion.schemes import read_scheme
from engine.messages import ConversionSettings
from kernels import native
from kernels.contract import LinearSpec, select
from kernels.linear.registry import kernels_for
from kernels.linear.rounding import Rounding
from kernels.linear.weights import LinearWeights

PROBE_ROWS = 16  # of a made-up matrix: what kernels refuse depends on channels, codes and groups
CPU = torch.device("cpu")


def slow_kernels(folder: Path, settings: ConversionSettings) -> tuple[str, ...]:
    """A line for each kind of layer that the scheme makes of this model and that only the reference kernel serves on a
    CPU, with the reasons of the faster ones. None where exact codes are recovered, which are as they are, nor without
    the C++ library, which would serve nothing. Raises ConversionRefused or UnsupportedModel as a conversion does."""
    if settings.scheme is None or native.MISSING is not None or folder.suffix == SUFFIX:
        return ()
    encoder, lines = read_scheme(settings.scheme), dict[str, None]()
    for width in sorted({in_features for _, in_features in linear_layers(folder).values()}):
        probe = torch.randn(PROBE_ROWS, width, generator=torch.Generator().manual_seed(0))
        try:
            lines |= dict.fromkeys(_slow(encoder.encode(probe)))
        except ValueError:
            continue  # the conversion says so of a layer, by its name
    return tuple(lines)


def _slow(weights: LinearWeights) -> list[str]:
    exact = any(isinstance(transform, Rounding) for transform in weights.pre)
    lines = []
    for term in weights.terms:
        sizes = (term.in_features, term.out_features, CPU, torch.float32, term.describe(), term.bits, term.group_size)
        spec, candidates = LinearSpec(*sizes, exact_activations=exact), kernels_for(term.family)
        if select(candidates, spec).kernel.name == "reference":
            reasons = dict.fromkeys(kernel.refuses(spec) or "" for kernel in candidates if "native" in kernel.name)
            lines.append(
                f"{term.describe()}: only the slow reference kernel would serve it on CPUs ({'; '.join(reasons)})"
            )
    return lines
