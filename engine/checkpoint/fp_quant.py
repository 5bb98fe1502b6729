"""FP-Quant checkpoints (arXiv:2509.23202, transformers' `fp_quant`): 4-bit floats between rotated inputs, both rounded.

    y = W Round(x M) + bias,   W[n, k] = table[code[n, k]] * scale[n, k // G] / weight_global_scale

    qweight                  [out, in / 2] uint8, two e2m1 codes a byte, the first channel low
    scales                   [at least out, in / G] uint8: exponents plus 127 of MXFP4, G 32; e4m3 of NVFP4, G 16
    weight_global_scale      [1] float
    act_global_scale         [1] float, of the e4m3 scales of rounded activations (NVFP4)
    forward_hadamard_matrix  [h, h] float, M, of every h channels: Sylvester's, or any other
    dqweight                 [out, in] float, W itself where the tool only emulated 4 bits ("pseudoquantization")

Rows of scales past the last output are the padding of the tool's kernels. They pad columns as well where there are no
multiples of 4 of them, and put the scales in an order of their own: such a layer is refused.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from engine.checkpoint.errors import FormatRefused, TensorError
from engine.checkpoint.linear import check_finite, present, read_bias, read_dense, read_settings, take_scalar
from engine.checkpoint.source import FLOATS, Source
from kernels.linear.dense.layout import DenseWeights
from kernels.linear.rounding import Rounding
from kernels.linear.table.layout import TableWeights
from kernels.linear.table.tables import E2M1
from kernels.linear.transforms import BlockRotation, Diagonal, Hadamard, Transform
from kernels.linear.weights import LinearWeights, Term

WHERE = "FP-Quant config"
MATRIX = "forward_hadamard_matrix"
BACKWARD = "backward_hadamard_matrix"  # of training
OTHERS = ("weight", "dqweight", "qweight", "scales")  # empty where not in use
# The tensors tell, or it is about training.
INFORMATIONAL = frozenset({"quant_method", "backward_dtype", "modules_to_not_convert", "transform_init"})
NOT_A_SCALE = {"mxfp4": (255,), "nvfp4": (127, 255)}  # bytes that stand for NaN
SAME = 2**-20  # relative: what may be the rounding of a square root in float32


class _Settings(msgspec.Struct, frozen=True):
    forward_dtype: Literal["mxfp4", "nvfp4"] = "nvfp4"
    forward_method: Literal["abs_max", "quest"] = "abs_max"
    hadamard_group_size: int | None = None
    pseudoquantization: bool = False
    store_master_weights: bool = False


@dataclass(frozen=True)
class FpQuant:
    """The reader of FP-Quant checkpoints."""

    settings: _Settings
    name: str = "fp_quant"

    @property
    def group_size(self) -> int:
        return 32 if self.settings.forward_dtype == "mxfp4" else 16

    def describe(self) -> str:
        return f"FP-Quant {self.settings.forward_dtype.upper()}"

    def linear(self, source: Source, name: str, shape: tuple[int, int], bias: bool) -> LinearWeights:
        if f"{name}.{MATRIX}" not in source:
            return read_dense(source, name, shape, bias)
        term = (
            self._emulated(source, name, shape) if self.settings.pseudoquantization else self._term(source, name, shape)
        )
        used = ("dqweight",) if self.settings.pseudoquantization else ("qweight", "scales")
        for key in present(source, name, [part for part in OTHERS if part not in used]):
            source.take(key, (0,), (*FLOATS, torch.uint8))
        for key in present(source, name, (BACKWARD,)):
            source.tensor(key)
        pre = (*_rotation(source, name, shape[1]), self._rounding(source, name))
        return LinearWeights((term,), pre, read_bias(source, name, shape[0], bias))

    def _term(self, source: Source, name: str, shape: tuple[int, int]) -> Term:
        out_features, in_features = shape
        if in_features % self.group_size:
            raise TensorError(f"{name} has {in_features} inputs, which are not whole groups of {self.group_size}")
        num_groups = in_features // self.group_size
        codes = source.take(f"{name}.qweight", (out_features, in_features // 2), (torch.uint8,))
        key = f"{name}.scales"
        stored = source.shape(key)
        if len(stored) != 2 or stored[0] < out_features or stored[1] != num_groups:
            raise TensorError(
                f"tensor {key!r} has shape {list(stored)}, expected at least {out_features} rows of {num_groups}: "
                "scales of rows that are padded lie in an order that is not known here"
            )
        scales = source.take(key, stored, (torch.uint8,))[:out_features].contiguous()
        if bool(torch.isin(scales, torch.tensor(NOT_A_SCALE[self.settings.forward_dtype], dtype=torch.uint8)).any()):
            raise TensorError(f"tensor {key!r} holds scales that are NaN")
        kind = torch.float8_e8m0fnu if self.settings.forward_dtype == "mxfp4" else torch.float8_e4m3fn
        factor = 1 / float(take_scalar(source, f"{name}.weight_global_scale"))
        return TableWeights(4, in_features, self.group_size, codes, scales.view(kind), E2M1, factor)

    def _emulated(self, source: Source, name: str, shape: tuple[int, int]) -> Term:
        take_scalar(source, f"{name}.weight_global_scale")
        key = f"{name}.dqweight"
        return DenseWeights(check_finite(source.take(key, shape), key))

    def _rounding(self, source: Source, name: str) -> Rounding:
        unit = take_scalar(source, f"{name}.act_global_scale")
        if self.settings.forward_dtype == "nvfp4":
            return Rounding("e2m1", 4, self.group_size, scale_grid="e4m3", scale_unit=1 / unit)
        grid: Literal["e8m0-third", "e8m0-deviation"]
        grid = "e8m0-third" if self.settings.forward_method == "abs_max" else "e8m0-deviation"
        return Rounding("e2m1", 4, self.group_size, scale_grid=grid)


def read_config(config: Mapping[str, Any]) -> FpQuant:
    """Build the reader from a quantization config. Raises FormatRefused naming the setting that is not supported."""
    settings = read_settings(config, _Settings, INFORMATIONAL, WHERE)
    if settings.store_master_weights:
        raise FormatRefused(
            f"{WHERE}: store_master_weights = True is not supported: its weights are not quantized yet; let the tool "
            "finish the model (fp_quant's finalize_master_weights), or remove the quantization config to serve them "
            "as they are"
        )
    if settings.forward_dtype == "nvfp4" and settings.forward_method != "abs_max":
        raise FormatRefused(f"{WHERE}: forward_method {settings.forward_method!r} is for mxfp4 only")
    return FpQuant(settings)


def _rotation(source: Source, name: str, in_features: int) -> tuple[Transform, ...]:
    """What makes x M of x. Sylvester's matrix takes h log2 h additions in place of h^2 products; one of bfloat16 is a
    multiple of it that is not quite orthonormal."""
    key = f"{name}.{MATRIX}"
    stored = source.shape(key)
    size = stored[0] if len(stored) == 2 else 0
    if size < 1 or stored != (size, size) or in_features % size:
        raise TensorError(f"tensor {key!r} has shape {list(stored)}, expected square blocks of {in_features} channels")
    matrix = check_finite(source.take(key, stored), key).float()  # [h, h]
    if torch.equal(matrix, torch.eye(size)):
        return ()
    entry = float(matrix[0, 0])
    if size & (size - 1) or not torch.equal(matrix, entry * _sylvester(size)):
        return (BlockRotation(matrix.t().contiguous().unsqueeze(0)),)
    ratio = entry * math.sqrt(size)
    if abs(ratio - 1) < SAME:
        return (Hadamard(size),)
    return (Hadamard(size), Diagonal(torch.full((in_features,), ratio)))


def _sylvester(size: int) -> Tensor:
    """[size, size] float32 of +1 and -1."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), dim=1), torch.cat((matrix, -matrix), dim=1)))
    return matrix
