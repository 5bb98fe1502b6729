"""bitsandbytes checkpoints, as transformers saves them: NF4 and FP4 in blocks, and the int8 of LLM.int8().

4 bits    w.flat[i] = table[q[i]] * absmax[i // blocksize]

    weight                                [out in / 2, 1]  uint8, or any type of the same bytes; high nibble first
    weight.absmax                         [blocks]         float32, or uint8 when statistics are nested
    weight.quant_map                      [16]             float32, the table of the tool; checked, not used
    weight.nested_absmax, _quant_map      [ceil(blocks / nested_blocksize)], [256]  float32
    weight.quant_state.bitsandbytes__nf4  JSON as bytes: blocksize, shape, nested_blocksize, nested_offset

    absmax[j] = nested_quant_map[stored[j]] * nested_absmax[j // nested_blocksize] + nested_offset

8 bits    w[n, k] = q[n, k] * (SCB[n] / 127)

    weight         [out, in]  int8
    SCB            [out]      float32, the largest magnitude of the row
    weight_format  []         uint8: 0, rows as they are

Blocks run over the flattened matrix and may straddle rows. In 8 bits the tool rounds activations too, but for channels
above llm_int8_threshold; here they are rounded, or not, as for every other format. The tool multiplies q, SCB and 1 /
127 in another order: weights agree within two roundings of float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from engine.checkpoint.blocks import blocks_to_groups, num_blocks
from engine.checkpoint.errors import FormatRefused, TensorError
from engine.checkpoint.linear import check_finite, read_bias, read_dense, read_settings
from engine.checkpoint.source import FLOATS, Source
from kernels.linear.affine.layout import AffineWeights
from kernels.linear.table.layout import TableWeights
from kernels.linear.table.tables import FP4, NF4
from kernels.linear.weights import LinearWeights

TABLES = {"nf4": NF4, "fp4": FP4}
STATE = "weight.quant_state.bitsandbytes__"
WHERE = "bitsandbytes config"
# How layers were chosen and computed by the tool; what they are made of stands beside each of them.
INFORMATIONAL = frozenset(
    {
        "_load_in_4bit",
        "_load_in_8bit",
        "bnb_4bit_compute_dtype",
        "bnb_4bit_quant_storage",
        "bnb_4bit_quant_type",
        "bnb_4bit_use_double_quant",
        "llm_int8_enable_fp32_cpu_offload",
        "llm_int8_skip_modules",
        "llm_int8_threshold",
        "quant_method",
    }
)
STORAGE = (torch.uint8, *FLOATS)
MAX_STATE_BYTES = 4096
ONE_127TH = 7.874015718698502e-3  # as the tool writes it
MIDDLE = 128  # code of the weight 0 in 8 bits


class _Settings(msgspec.Struct, frozen=True):
    load_in_4bit: bool = False
    load_in_8bit: bool = False


class _State(msgspec.Struct, frozen=True):
    """The JSON beside a 4-bit weight."""

    quant_type: Literal["nf4", "fp4"]
    blocksize: int
    shape: tuple[int, int]
    nested_blocksize: int | None = None
    nested_dtype: Literal["float32"] | None = None
    nested_offset: float | None = None


@dataclass(frozen=True)
class BitsAndBytes:
    """The reader of bitsandbytes checkpoints."""

    bits: int
    name: str = "bitsandbytes"

    def describe(self) -> str:
        return f"bitsandbytes {self.bits}-bit"

    def linear(self, source: Source, name: str, shape: tuple[int, int], bias: bool) -> LinearWeights:
        state = next((kind for kind in TABLES if f"{name}.{STATE}{kind}" in source), None)
        term: TableWeights | AffineWeights
        if state is not None:
            term = _four_bits(source, name, shape, f"{name}.{STATE}{state}")
        elif f"{name}.SCB" in source:
            term = _eight_bits(source, name, shape)
        else:
            return read_dense(source, name, shape, bias)
        return LinearWeights((term,), bias=read_bias(source, name, shape[0], bias))


def read_config(config: Mapping[str, Any]) -> BitsAndBytes:
    """Build the reader from a quantization config. Raises FormatRefused naming the setting that is not supported."""
    settings = read_settings(config, _Settings, INFORMATIONAL, WHERE)
    if settings.load_in_4bit == settings.load_in_8bit:
        raise FormatRefused(f"{WHERE}: one of load_in_4bit and load_in_8bit must be true")
    return BitsAndBytes(4 if settings.load_in_4bit else 8)


def _four_bits(source: Source, name: str, shape: tuple[int, int], state_name: str) -> TableWeights:
    state = _read_state(source, state_name, shape)
    key = f"{name}.weight"
    if source.dtype(key) not in STORAGE:
        raise TensorError(f"tensor {key!r} has dtype {source.dtype(key)}, which does not hold packed bytes")
    out_features, in_features = shape
    num_bytes = -(-out_features * in_features // 2)
    stored = source.take(key, (-(-num_bytes // source.dtype(key).itemsize), 1), STORAGE)
    absmax = _absmax(source, key, state, num_blocks(state.blocksize, shape))
    group_size, scales = blocks_to_groups(absmax, state.blocksize, shape)
    table = TABLES[state.quant_type]
    _check_table(source, f"{key}.quant_map", table)
    return TableWeights(
        bits=4,
        in_features=in_features,
        group_size=group_size,
        codes=_codes(stored.view(torch.uint8).flatten()[:num_bytes], shape),  # [out, in / 2]
        scales=scales,  # [out, in / group_size]
        table=table,
    )


def _codes(stored: Tensor, shape: tuple[int, int]) -> Tensor:
    """[out * in / 2] uint8, high nibble first -> [out, ceil(in / 2)], low nibble first."""
    out_features, in_features = shape
    if in_features % 2 == 0:
        swapped = (stored >> 4) | (stored << 4)
        return swapped.view(out_features, in_features // 2)
    raise TensorError(f"rows of {in_features} channels do not end at a byte: 4-bit weights of an odd width are refused")


def _absmax(source: Source, key: str, state: _State, count: int) -> Tensor:
    """The scale of every block, [count] float32: nested ones are dequantized as the tool does, in the same order."""
    name = f"{key}.absmax"
    if state.nested_blocksize is None or state.nested_offset is None:
        return check_finite(source.take(name, (count,), (torch.float32,)), name)
    inner = source.take(name, (count,), (torch.uint8,))
    size = -(-count // state.nested_blocksize)
    outer = source.take(f"{key}.nested_absmax", (size,), (torch.float32,))
    table = source.take(f"{key}.nested_quant_map", (256,), (torch.float32,))
    spread = outer.repeat_interleave(state.nested_blocksize)[:count] if size > 1 else outer  # [count] or [1]
    return check_finite(table[inner.int()] * spread + torch.tensor(state.nested_offset, dtype=torch.float32), name)


def _check_table(source: Source, name: str, table: tuple[float, ...]) -> None:
    """The tool dequantizes by its own table, whatever is stored; another one there means another format."""
    stored = source.take(name, (16,), (torch.float32,))
    if not torch.allclose(stored, torch.tensor(table), rtol=0, atol=1e-6):
        raise TensorError(f"tensor {name!r} is not the table of its format: {stored.tolist()}")


def _read_state(source: Source, name: str, shape: tuple[int, int]) -> _State:
    """The JSON of a 4-bit weight, checked. Raises TensorError naming the tensor that holds it."""
    dims = source.shape(name)
    if len(dims) != 1 or dims[0] > MAX_STATE_BYTES:
        raise TensorError(f"tensor {name!r} has shape {list(dims)}, expected at most {MAX_STATE_BYTES} bytes of JSON")
    content = bytes(source.take(name, dims, (torch.uint8,)).tolist())
    try:
        state = msgspec.json.decode(content, type=_State)
    except msgspec.DecodeError as error:  # also of a ValidationError
        raise TensorError(f"tensor {name!r} does not hold the JSON of a 4-bit weight: {error}") from error
    if state.shape != shape:
        raise TensorError(f"tensor {name!r} describes a weight of shape {list(state.shape)}, expected {list(shape)}")
    for what, size in (("blocksize", state.blocksize), ("nested_blocksize", state.nested_blocksize)):
        if size is not None and not 1 <= size <= 1 << 16:
            raise TensorError(f"tensor {name!r}: {what} {size} is not between 1 and 65,536")
    if (state.nested_blocksize is None) != (state.nested_offset is None):
        raise TensorError(f"tensor {name!r} names only one of nested_blocksize and nested_offset")
    return state


def _eight_bits(source: Source, name: str, shape: tuple[int, int]) -> AffineWeights:
    weight = source.take(f"{name}.weight", shape, (torch.int8,))
    largest = check_finite(source.take(f"{name}.SCB", (shape[0],), (torch.float32,)), f"{name}.SCB")
    layout = f"{name}.weight_format"
    if layout in source and int(source.take(layout, (), (torch.uint8,))) != 0:
        raise TensorError(f"tensor {layout!r} is not 0: weights in the order of a GPU kernel are not supported")
    return AffineWeights(
        bits=8,
        in_features=shape[1],
        group_size=shape[1],
        codes=weight.view(torch.uint8) ^ MIDDLE,  # q + 128
        scales=(largest * ONE_127TH).unsqueeze(1),  # [out, 1]
        zeros=torch.full((1, 1), MIDDLE, dtype=torch.uint8).expand(shape[0], 1),
    )
