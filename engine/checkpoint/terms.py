"""The terms and transforms of the nibble container: what config.json says of each, and the tensors beside it.

Every struct reads itself from a checkpoint and is made from what it describes, one being the inverse of the other. A
field that is not listed here is refused by name.
"""

from types import MappingProxyType
from typing import Any, get_args

import msgspec
import torch
from torch import Tensor

from engine.checkpoint.errors import FormatRefused, TensorError
from engine.checkpoint.source import FLOATS, Source
from kernels.linear.affine.layout import AffineWeights
from kernels.linear.codebook.layout import CODE_DTYPES, CodebookWeights
from kernels.linear.dense.layout import DenseWeights
from kernels.linear.lookup.layout import LookupWeights
from kernels.linear.lowrank.layout import LowRankWeights
from kernels.linear.sparse.layout import SparseWeights
from kernels.linear.table.layout import SCALE_DTYPES, TableWeights
from kernels.linear.transforms import BlockRotation, Diagonal, Hadamard, Permutation

E8M0 = torch.float8_e8m0fnu
LARGEST_FLOAT = torch.finfo(torch.float32).max
Tensors = dict[str, Tensor]  # by the part of their name after the term's own: "codes"
Shape = tuple[int, int]  # (out_features, in_features)


class TermSettings(msgspec.Struct, frozen=True, tag_field="family", forbid_unknown_fields=True):
    """Base of the terms."""


class AffineTerm(TermSettings, frozen=True, tag="affine"):
    """codes [N, K * bits / 8] uint8, scales [N, K / G] float or e8m0, zeros [N, K / G] uint8 or float unless `zero`."""

    bits: int
    group_size: int
    zero: float | None = None  # of every group

    def read(self, source: Source, at: str, shape: Shape) -> AffineWeights:
        codes, groups = _codes_and_groups(source, at, shape, self.bits, self.group_size)
        scales = take_finite(source, f"{at}.scales", groups, (*FLOATS, E8M0))
        if scales.dtype == E8M0:
            scales = scales.float().bfloat16()  # the same powers of two
        _check_floats(at, "zero", (self.zero or 0.0,))
        if self.zero is None:
            zeros = take_finite(source, f"{at}.zeros", groups, (torch.uint8, *FLOATS))
        else:
            is_byte = self.zero.is_integer() and 0 <= self.zero <= 255
            zeros = torch.tensor([[self.zero]], dtype=torch.uint8 if is_byte else torch.float32).expand(groups)
        return AffineWeights(self.bits, shape[1], min(self.group_size, shape[1]), codes, scales, zeros)


def of_affine(weights: AffineWeights) -> tuple[AffineTerm, Tensors]:
    """Scales that are all powers of two take one byte each; they are read as bfloat16."""
    tensors = {"codes": weights.codes, "scales": _compact(weights.scales)}
    if weights.has_one_zero and weights.zeros.numel():
        return AffineTerm(weights.bits, weights.group_size, float(weights.zeros[0, 0])), tensors
    return AffineTerm(weights.bits, weights.group_size), tensors | {"zeros": weights.zeros}


class TableTerm(TermSettings, frozen=True, tag="table"):
    """codes [N, K * bits / 8] uint8, scales [N, K / G] float, e4m3 or e8m0; factor [1] float64 where there is one."""

    bits: int
    group_size: int
    table: tuple[float, ...]
    factor: bool = False

    def read(self, source: Source, at: str, shape: Shape) -> TableWeights:
        _check_floats(at, "table", self.table)
        codes, groups = _codes_and_groups(source, at, shape, self.bits, self.group_size)
        scales = take_finite(source, f"{at}.scales", groups, SCALE_DTYPES)
        factor = float(take_finite(source, f"{at}.factor", (1,), (torch.float64,))) if self.factor else 1.0
        return TableWeights(self.bits, shape[1], min(self.group_size, shape[1]), codes, scales, self.table, factor)


def of_table(weights: TableWeights) -> tuple[TableTerm, Tensors]:
    tensors = {"codes": weights.codes, "scales": _compact(weights.scales)}
    if has_factor := weights.factor != 1.0:
        tensors["factor"] = torch.tensor([weights.factor], dtype=torch.float64)
    return TableTerm(weights.bits, weights.group_size, weights.table, has_factor), tensors


class LookupTerm(TermSettings, frozen=True, tag="lookup"):
    """codes [N, K * bits / 8] uint8, tables [N, K / G, 2**bits] float."""

    bits: int
    group_size: int

    def read(self, source: Source, at: str, shape: Shape) -> LookupWeights:
        codes, groups = _codes_and_groups(source, at, shape, self.bits, self.group_size)
        tables = take_finite(source, f"{at}.tables", (*groups, 2**self.bits), FLOATS)
        return LookupWeights(self.bits, shape[1], min(self.group_size, shape[1]), codes, tables)


def of_lookup(weights: LookupWeights) -> tuple[LookupTerm, Tensors]:
    return LookupTerm(weights.bits, weights.group_size), {"codes": weights.codes, "tables": weights.tables}


class CodebookTerm(TermSettings, frozen=True, tag="codebook"):
    """codes [N, K / d] uint8 or int16, scales [N, K / G] float, book [vectors, d] float: its own, or the one named."""

    vector_size: int
    num_vectors: int
    group_size: int
    book: str | None = None  # the tensor's full name

    def read(self, source: Source, at: str, shape: Shape) -> CodebookWeights:
        if self.vector_size < 1 or self.group_size < 1:
            raise FormatRefused(f"{at}: vector_size and group_size must be positive")
        codes = source.take(f"{at}.codes", (shape[0], shape[1] // self.vector_size), CODE_DTYPES)
        scales = take_finite(source, f"{at}.scales", (shape[0], -(-shape[1] // self.group_size)), FLOATS)
        book = take_finite(source, self.book or f"{at}.book", (self.num_vectors, self.vector_size), FLOATS)
        return CodebookWeights(shape[1], min(self.group_size, shape[1]), codes, book, scales)


def of_codebook(weights: CodebookWeights) -> tuple[CodebookTerm, Tensors]:
    num_vectors, vector_size = weights.book.shape
    tensors = {"codes": weights.codes, "scales": weights.scales, "book": weights.book}
    return CodebookTerm(vector_size, num_vectors, weights.group_size), tensors


class DenseTerm(TermSettings, frozen=True, tag="dense"):
    """weight [N, K] float."""

    def read(self, source: Source, at: str, shape: Shape) -> DenseWeights:
        return DenseWeights(source.take(f"{at}.weight", shape))


def of_dense(weights: DenseWeights) -> tuple[DenseTerm, Tensors]:
    return DenseTerm(), {"weight": weights.weight}


class LowRankTerm(TermSettings, frozen=True, tag="lowrank"):
    """a [N, rank] float, b [rank, K] float."""

    rank: int

    def read(self, source: Source, at: str, shape: Shape) -> LowRankWeights:
        a = source.take(f"{at}.a", (shape[0], self.rank))
        return LowRankWeights(a, source.take(f"{at}.b", (self.rank, shape[1])))


def of_lowrank(weights: LowRankWeights) -> tuple[LowRankTerm, Tensors]:
    return LowRankTerm(weights.rank), {"a": weights.a, "b": weights.b}


class SparseTerm(TermSettings, frozen=True, tag="sparse"):
    """starts [N + 1] int32, columns [entries] int32, values [entries] float."""

    def read(self, source: Source, at: str, shape: Shape) -> SparseWeights:
        starts = source.take(f"{at}.starts", (shape[0] + 1,), (torch.int32,))
        num_entries = source.shape(f"{at}.columns")
        columns = source.take(f"{at}.columns", num_entries, (torch.int32,))
        return SparseWeights(shape[1], starts, columns, take_finite(source, f"{at}.values", num_entries, FLOATS))


def of_sparse(weights: SparseWeights) -> tuple[SparseTerm, Tensors]:
    return SparseTerm(), {"starts": weights.starts, "columns": weights.columns, "values": weights.values}


class TransformSettings(msgspec.Struct, frozen=True, tag_field="kind", forbid_unknown_fields=True):
    """Base of the transforms. All are square."""


class PermutationStep(TransformSettings, frozen=True, tag="permutation"):
    """index [width] int32 or int64."""

    def read(self, source: Source, at: str, width: int) -> Permutation:
        index = source.take(f"{at}.index", (width,), (torch.int32, torch.int64)).long()
        if not torch.equal(index.sort().values, torch.arange(width)):
            raise TensorError(f"tensor {at + '.index'!r} does not name every one of {width} channels once")
        return Permutation(index)


class DiagonalStep(TransformSettings, frozen=True, tag="diagonal"):
    """scale [width] float."""

    def read(self, source: Source, at: str, width: int) -> Diagonal:
        return Diagonal(take_finite(source, f"{at}.scale", (width,), FLOATS))


class HadamardStep(TransformSettings, frozen=True, tag="hadamard"):
    """No tensor."""

    block: int

    def read(self, source: Source, at: str, width: int) -> Hadamard:
        hadamard = Hadamard(self.block)
        if width % self.block:
            raise FormatRefused(f"{at}: {width} channels are not whole Hadamard blocks of {self.block}")
        return hadamard


class RotationStep(TransformSettings, frozen=True, tag="rotation"):
    """matrices [width / block or 1, block, block] float."""

    block: int
    shared: bool = False  # one matrix for all runs

    def read(self, source: Source, at: str, width: int) -> BlockRotation:
        if self.block < 1 or width % self.block:
            raise FormatRefused(f"{at}: {width} channels are not whole blocks of {self.block}")
        num_runs = 1 if self.shared else width // self.block
        return BlockRotation(take_finite(source, f"{at}.matrices", (num_runs, self.block, self.block), FLOATS))


def of_transform(transform: Any) -> tuple[TransformSettings, Tensors]:
    """What the container holds of a transform. Raises TypeError for one it has no name for."""
    match transform:
        case Permutation(index):
            return PermutationStep(), {"index": index.int()}
        case Diagonal(scale):
            return DiagonalStep(), {"scale": scale}
        case Hadamard(block):
            return HadamardStep(block), {}
        case BlockRotation(matrices):
            return RotationStep(matrices.shape[1], matrices.shape[0] == 1), {"matrices": matrices}
    raise TypeError(f"the container has no transform {type(transform).__name__}")


def of_term(term: Any) -> tuple[TermSettings, Tensors]:
    """What the container holds of a term. Raises TypeError for a family it has no name for."""
    writers: dict[type[Any], Any] = {
        AffineWeights: of_affine,
        CodebookWeights: of_codebook,
        DenseWeights: of_dense,
        LookupWeights: of_lookup,
        LowRankWeights: of_lowrank,
        SparseWeights: of_sparse,
        TableWeights: of_table,
    }
    if type(term) not in writers:
        raise TypeError(f"the container has no term of family {term.family!r}")
    settings, tensors = writers[type(term)](term)
    return settings, tensors


def _check_floats(at: str, field: str, values: tuple[float, ...]) -> None:
    if not all(abs(value) <= LARGEST_FLOAT for value in values):
        raise FormatRefused(f"{at}: {field} holds {values}, of which one is not a finite float32")


def _compact(scales: Tensor) -> Tensor:
    """One byte for each scale when all are powers of two."""
    if scales.element_size() == 1:
        return scales
    exponents = scales.float().to(E8M0)
    return exponents if torch.equal(exponents.float(), scales.float()) else scales


def take_finite(source: Source, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """Like source.take; raises TensorError also when a value is NaN or infinite."""
    tensor = source.take(name, shape, dtypes)
    if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
        raise TensorError(f"tensor {name!r} holds a value that is not finite")
    return tensor


def _codes_and_groups(source: Source, at: str, shape: Shape, bits: int, group_size: int) -> tuple[Tensor, Shape]:
    """The packed codes, and the shape [N, K / G] of what groups share."""
    if not 1 <= bits <= 8 or group_size < 1:
        raise FormatRefused(f"{at}: {bits} bits in groups of {group_size} make no weights")
    codes = source.take(f"{at}.codes", (shape[0], -(-shape[1] * bits // 8)), (torch.uint8,))
    return codes, (shape[0], -(-shape[1] // group_size))


Term = AffineTerm | CodebookTerm | DenseTerm | LookupTerm | LowRankTerm | SparseTerm | TableTerm
Step = DiagonalStep | HadamardStep | PermutationStep | RotationStep
STEPS = MappingProxyType({str(kind.__struct_config__.tag): kind for kind in get_args(Step)})  # kind -> its struct
