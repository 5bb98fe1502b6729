"""QuIP# checkpoints (arXiv:2402.04396): codes of E8 lattice vectors between two randomized Hadamard transforms.

    y = SV * Wscale * H_out ( sum_t W_t H_in^T (SU * x) ),   W_t[n, 8 k + i] = book_t[code_t[n, k], i] / r_t

    Qidxs        [out, in / 32] of E8P12, [out, in / 16] of E8P12RVQ4B, [out, 3 in / 64] of E8P12RVQ3B   int64
    SU, SV       [in], [out]   float: signs, or learned scales
    Wscale       []            float; 1 where it is in SV already
    codebook_id  []            int64
    fuse_scales  [parts]       float, of the layers below

q, k and v are one layer, qkv_proj, and so are up and gate, upgate_proj: the transform H_out mixes the outputs of all of
them. The definition is quip-sharp's own: r is 1, and the residual scale for the second half of 3 and 4 bits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from types import MappingProxyType
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from engine.checkpoint.errors import CheckpointError, FormatRefused, TensorError
from engine.checkpoint.hadamards import hadamard_of
from engine.checkpoint.linear import read_bias, read_dense, read_settings, take_scales
from engine.checkpoint.quip_codes import (
    ROWS_PER_TILE,
    VECTOR,
    VECTORS_PER_TILE,
    e8_book,
    e8p_book,
    unpack_bytes,
    unpack_e8p,
)
from engine.checkpoint.source import Source
from kernels.linear.codebook.layout import CodebookWeights
from kernels.linear.dense.layout import DenseWeights
from kernels.linear.transforms import Diagonal
from kernels.linear.weights import LinearWeights

PARAMS = "quip_params"  # of config.json
WHERE = "quip_params"
MARK = "Qidxs"
# The tensors tell; train_mode is of the tool's own finetuning.
INFORMATIONAL = frozenset(
    {"codesz", "packsz", "idx_dtype", "model_version", "ocs_down_size", "fused", "skip_list", "train_mode"}
)
FUSED = MappingProxyType(  # name of the layer in the checkpoint -> those that it is, in order
    {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "upgate_proj": ("up_proj", "gate_proj")}
)
COLUMNS = VECTOR * VECTORS_PER_TILE


class _Settings(msgspec.Struct, frozen=True):
    codebook: Literal["E8P12", "E8P12RVQ3B", "E8P12RVQ4B"]
    codebook_version: int = 0
    resid_scale_override: float = -1.0


@dataclass(frozen=True)
class _Kind:
    """What a codebook's name stands for."""

    number: int  # codebook_id
    version: int  # of the packing that is read
    bits: int
    residual_scale: float


KINDS = MappingProxyType(
    {
        "E8P12": _Kind(7, 1, 2, 1.0),
        "E8P12RVQ4B": _Kind(17, 1, 4, 3.45),
        "E8P12RVQ3B": _Kind(18, 0, 3, 2.04),
    }
)


@dataclass(frozen=True)
class FusedLayer:
    """Several layers that the checkpoint holds as one."""

    name: str
    weights: LinearWeights
    outputs: tuple[slice, ...]  # of each of the layers, as they were asked for


@dataclass(frozen=True)
class Quip:
    """The reader of QuIP# checkpoints. All layers share the books."""

    kind: _Kind
    residual_scale: float
    book: Tensor  # [65536, 8] float16
    residual_book: Tensor | None  # [65536 or 256, 8] float16
    name: str = "quip#"

    def describe(self) -> str:
        return f"QuIP# {self.kind.bits}-bit"

    def linear(self, source: Source, name: str, shape: tuple[int, int], bias: bool) -> LinearWeights:
        """A part of a fused layer alone comes back dense, in float32: its rows exist only behind the transform."""
        if self._fused_name(source, name) is not None:
            return self._part(source, name, shape, bias)
        if f"{name}.{MARK}" not in source:
            return read_dense(source, name, shape, bias)
        return self._layer(source, name, shape, bias, None)

    def fused(self, source: Source, layers: Sequence[tuple[str, tuple[int, int]]], bias: bool) -> FusedLayer | None:
        """The one layer that the checkpoint holds for `layers`, names and shapes; None when it holds each.

        Raises TensorError for damaged tensors, FormatRefused for what is not supported.
        """
        name = self._fused_name(source, layers[0][0])
        if name is None:
            return None
        order = FUSED[name.rpartition(".")[2]]
        shapes = {layer.rpartition(".")[2]: shape for layer, shape in layers}
        sizes = [shapes[part][0] for part in order]
        scales = take_scales(source, f"{name}.fuse_scales", (len(order),)).float().tolist()
        spread = torch.cat([torch.full((size,), scale) for size, scale in zip(sizes, scales, strict=True)])
        weights = self._layer(source, name, (sum(sizes), layers[0][1][1]), bias, spread)
        stops = dict(zip(order, accumulate(sizes), strict=True))
        outputs = tuple(slice(stops[part] - shapes[part][0], stops[part]) for part in shapes)
        return FusedLayer(name, weights, outputs)

    def _part(self, source: Source, name: str, shape: tuple[int, int], bias: bool) -> LinearWeights:
        fused, (rows, in_features) = self._fused_name(source, name), shape
        assert fused is not None
        prefix, _, part = name.rpartition(".")
        order = FUSED[fused.rpartition(".")[2]]
        total = prod(source.shape(f"{fused}.SV"))
        others = (total - rows) // (len(order) - 1) if part == order[0] else rows  # only q may have rows of its own
        sizes = (total - others * (len(order) - 1), *[others] * (len(order) - 1))
        if min(sizes) < 1 or sizes[order.index(part)] != rows:
            raise TensorError(
                f"{fused} has {total} rows, which are not those of {', '.join(order)} with {rows} of {part}"
            )
        layers = [(f"{prefix}.{other}", (size, in_features)) for other, size in zip(order, sizes, strict=True)]
        layer = self.fused(source, layers, bias)
        assert layer is not None
        columns = layer.outputs[order.index(part)]
        own_bias = None if layer.weights.bias is None else layer.weights.bias[columns]
        return LinearWeights((DenseWeights(layer.weights.dequantize()[columns]),), bias=own_bias)

    def _fused_name(self, source: Source, name: str) -> str | None:
        prefix, _, last = name.rpartition(".")
        fused = next((f"{prefix}.{whole}" for whole, parts in FUSED.items() if last in parts), None)
        return fused if fused is not None and f"{fused}.{MARK}" in source else None

    def _layer(
        self, source: Source, name: str, shape: tuple[int, int], bias: bool, out_scales: Tensor | None
    ) -> LinearWeights:
        out_features, in_features = shape
        if out_features % ROWS_PER_TILE or in_features % COLUMNS:
            raise TensorError(f"{name} is {out_features} x {in_features}, which are not whole tiles of 16 x {COLUMNS}")
        number = int(source.take(f"{name}.codebook_id", (), (torch.int64,)))
        if number != self.kind.number:
            raise TensorError(f"tensor '{name}.codebook_id' is {number}, expected {self.kind.number}")
        su = take_scales(source, f"{name}.SU", (in_features,))
        sv = take_scales(source, f"{name}.SV", (out_features,)).float()
        sv = sv * take_scales(source, f"{name}.Wscale", ()).float()
        sv = sv if out_scales is None else sv * out_scales
        try:
            pre = (Diagonal(su), *hadamard_of(in_features, transposed=True))
            post = (*hadamard_of(out_features), Diagonal(sv))
            terms = self._terms(source, name, shape)
        except CheckpointError:
            raise
        except ValueError as error:
            raise FormatRefused(f"{name}: {error}") from error
        offsets = read_bias(source, name, out_features, bias)
        if offsets is not None and out_scales is not None:
            offsets = offsets.float() * out_scales  # the tool adds before it scales
        return LinearWeights(terms, pre, offsets, post)

    def _terms(self, source: Source, name: str, shape: tuple[int, int]) -> tuple[CodebookWeights, ...]:
        out_features, in_features = shape
        words = source.take(f"{name}.{MARK}", (out_features, in_features * self.kind.bits // 64), (torch.int64,))
        ones = torch.ones(out_features, 1, dtype=torch.float16)
        first, second = words[:, : in_features // 32], words[:, in_features // 32 :]
        terms = (CodebookWeights(in_features, in_features, unpack_e8p(first), self.book, ones),)
        if self.residual_book is None:
            return terms
        codes = unpack_e8p(second) if self.kind.bits == 4 else unpack_bytes(second)
        scale = torch.full((out_features, 1), 1 / self.residual_scale)
        return (*terms, CodebookWeights(in_features, in_features, codes, self.residual_book, scale))


def read_config(config: Mapping[str, Any]) -> Quip:
    """Build the reader from quip_params. Raises FormatRefused naming the setting that is not supported."""
    if not isinstance(config, Mapping):
        raise FormatRefused(f"{WHERE} in config.json must be an object, found {config!r}")
    settings = read_settings(config, _Settings, INFORMATIONAL, WHERE)
    kind = KINDS[settings.codebook]
    if settings.codebook_version != kind.version:
        raise FormatRefused(
            f"{WHERE}: codebook_version {settings.codebook_version} of {settings.codebook} is not supported, only "
            f"{kind.version} is: fetch a newer release of the checkpoint"
        )
    book = e8p_book()
    residual = {2: None, 3: e8_book(), 4: book}[kind.bits]
    override = settings.resid_scale_override
    return Quip(kind, override if override > 0 else kind.residual_scale, book, residual)
