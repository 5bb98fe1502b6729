"""ASVD checkpoints (arXiv:2312.05821): some linear layers as pairs of thin ones.

    y = A (B x) + bias

    <module>.BLinear.weight   [rank, in]
    <module>.ALinear.weight   [out, rank]
    <module>.ALinear.bias     [out], where the model has one

config.json holds `truncation_ranks`, module -> rank, and code of its own under `auto_map`, which is not run: the layers
are those of the model that `model_type` names. Modules without a rank are dense.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.checkpoint.errors import FormatRefused
from engine.checkpoint.linear import read_bias, read_dense
from engine.checkpoint.source import Source
from kernels.linear.lowrank.layout import LowRankWeights
from kernels.linear.weights import LinearWeights

RANKS = "truncation_ranks"


@dataclass(frozen=True)
class Asvd:
    """The reader of ASVD checkpoints."""

    ranks: Mapping[str, int]  # by module
    name: str = "asvd"

    def describe(self) -> str:
        return f"ASVD, {len(self.ranks)} low-rank pairs"

    def linear(self, source: Source, name: str, shape: tuple[int, int], bias: bool) -> LinearWeights:
        if name not in self.ranks:
            return read_dense(source, name, shape, bias)
        out_features, in_features = shape
        rank = self.ranks[name]
        b = source.take(f"{name}.BLinear.weight", (rank, in_features))
        a = source.take(f"{name}.ALinear.weight", (out_features, rank))
        return LinearWeights((LowRankWeights(a, b),), bias=read_bias(source, f"{name}.ALinear", out_features, bias))


def read_config(config: Mapping[str, Any]) -> Asvd:
    """Build the reader from the whole config.json. Raises FormatRefused when `truncation_ranks` is not what it says."""
    ranks = config[RANKS]
    if not isinstance(ranks, Mapping):
        raise FormatRefused(f"ASVD config: {RANKS} must be an object, found {ranks!r}")
    for module, rank in ranks.items():
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise FormatRefused(f"ASVD config: {RANKS} of {module!r} must be a positive number, found {rank!r}")
    return Asvd(dict(ranks))
