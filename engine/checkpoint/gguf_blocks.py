"""Blocks of ggml's types -> canonical weights, exactly: every product of scales is formed as ggml forms it, in float32.

    Q4_0 Q5_0 Q8_0   32 weights   d (q - z)                          d float16
    Q4_1 Q5_1        32           d q + m                            d, m float16
    Q2_K             256          (d sc) q - (dmin m)                16 groups; sc, m of 4 bits; d, dmin float16
    Q4_K Q5_K        256          (d sc) q - (dmin m)                8 groups; sc, m of 6 bits
    Q3_K Q6_K        256          (d sc) (q - z)                     16 groups; sc of 6 bits less 32, of 8 bits signed
    IQ4_NL IQ4_XS    32, 256      d t[q], (d sc) t[q]                a table of 16; 8 groups, sc of 6 bits less 32
    TQ1_0 TQ2_0      256          d (q - 1), q = 0, 1, 2             five trits to a byte, or four
    MXFP4            32           2^(e - 127) t[q]                   e of 8 bits, E2M1

Facts from ggml-org/llama.cpp, gguf-py/gguf/quants.py. A byte of a run holds fields of
weights that are a run apart: nothing lies in the order of the weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from engine.checkpoint.errors import TensorError
from engine.checkpoint.gguf_file import BlockType
from kernels.linear.affine.layout import AffineWeights, Nested
from kernels.linear.bitstream import pack_codes
from kernels.linear.dense.layout import DenseWeights
from kernels.linear.table.layout import TableWeights
from kernels.linear.table.tables import E2M1, TERNARY
from kernels.linear.weights import Term

IQ4 = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
DENSE = MappingProxyType({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16})
WEIGHTS_AT_ONCE = 1 << 19  # unpacked together, one byte each and some copies, so that they stay in a core's cache


@dataclass(frozen=True)
class Unpacked:
    """Some rows of blocks, unpacked. Where a block has steps, scales and offsets are int8 and count them."""

    codes: Tensor  # [rows, K] uint8, in the order of the weights
    scales: Tensor  # [rows, blocks, groups of a block]
    offsets: Tensor | None = None  # likewise, of the scales' dtype
    scale_steps: Tensor | None = None  # [rows, blocks, 1] float16
    offset_steps: Tensor | None = None  # [rows, blocks, 1] float16


@dataclass(frozen=True)
class Layout:
    """A type's canonical form, and how it is reached."""

    bits: int
    group_size: int
    unpack: Callable[[Tensor], Unpacked]  # [rows, blocks, bytes] uint8
    zero: int = 0
    table: tuple[float, ...] = ()


def to_term(raw: Tensor, block: BlockType, name: str) -> Term:
    """The matrix of rows of blocks, [N, bytes of a row] uint8. Raises TensorError, with `name`, for damaged blocks."""
    if block.name in DENSE:
        return DenseWeights(raw.view(DENSE[block.name]))
    layout = LAYOUTS[block.name]
    num_rows, num_blocks = raw.shape[0], raw.shape[1] // block.num_bytes
    in_features = num_blocks * block.weights
    codes = torch.empty(num_rows, in_features * layout.bits // 8, dtype=torch.uint8, device=raw.device)
    parts: list[Unpacked] = []
    for start in range(0, num_rows, rows_at_once := max(1, WEIGHTS_AT_ONCE // in_features)):
        rows = raw[start : start + rows_at_once]
        part = layout.unpack(rows.view(rows.shape[0], num_blocks, block.num_bytes))
        codes[start : start + rows_at_once] = _pack(part.codes, layout.bits)
        parts.append(replace(part, codes=codes[:0]))
    scales, scale_steps = _joined([part.scales for part in parts]), _joined([part.scale_steps for part in parts])
    offsets, offset_steps = _joined([part.offsets for part in parts]), _joined([part.offset_steps for part in parts])
    assert scales is not None
    exact = _counted(name, scales, scale_steps)
    if layout.table:
        return _table(layout, in_features, codes, exact, name)
    zeros = torch.tensor([[layout.zero]], dtype=torch.uint8, device=raw.device).expand(scales.shape)
    exact_offsets = None if offsets is None else _counted(name, offsets, offset_steps)
    nested = None if scale_steps is None else Nested(scales, scale_steps, offsets, offset_steps)
    return AffineWeights(layout.bits, in_features, layout.group_size, codes, exact, zeros, exact_offsets, nested)


def _table(layout: Layout, in_features: int, codes: Tensor, scales: Tensor, name: str) -> TableWeights:
    try:
        return TableWeights(layout.bits, in_features, layout.group_size, codes, scales, layout.table)
    except ValueError as error:
        raise TensorError(f"tensor {name!r} is damaged: {error}") from error


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    """[rows, blocks, n] each -> [N, blocks * n], or None where blocks have none."""
    given = [part.flatten(1) for part in parts if part is not None]
    return torch.cat(given) if given else None


def _counted(name: str, counts: Tensor, steps: Tensor | None) -> Tensor:
    """counts * steps, [N, groups] floating: 11 bits by at most 8, exact in float32. Raises TensorError."""
    product = counts
    if steps is not None:
        product = (counts.view(*steps.shape, -1) * steps.float().unsqueeze(-1)).flatten(1)
    if not bool(product.float().isfinite().all()):
        raise TensorError(f"tensor {name!r} is damaged: one of its scales is NaN or infinite")
    return product


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, K] -> the little-endian bit stream, by bytes where they hold whole codes."""
    if bits == 8:
        return codes
    if bits == 4:
        return codes[:, 0::2] | (codes[:, 1::2] << 4)
    if bits == 2:
        return codes[:, 0::4] | (codes[:, 1::4] << 2) | (codes[:, 2::4] << 4) | (codes[:, 3::4] << 6)
    return pack_codes(codes, bits)


# ---- fields of blocks, [rows, blocks, bytes] uint8 -------------------------------------------------------------------


def _fields(part: Tensor, bits: int, run: int) -> Tensor:
    """Runs of `run` bytes -> the lowest fields of all bytes of a run, then the next ones: [rows, weights] uint8."""
    runs = part.reshape(part.shape[0], -1, run)  # [rows, runs of all blocks, run]
    mask = (1 << bits) - 1
    return torch.stack([(runs >> shift) & mask for shift in range(0, 8, bits)], dim=2).flatten(1)


def _half(part: Tensor) -> Tensor:
    """[rows, blocks, 2] bytes -> [rows, blocks, 1] float16."""
    return part.contiguous().view(torch.float16)


def _signed(part: Tensor) -> Tensor:
    """Bytes as int8."""
    return part.contiguous().view(torch.int8)


def _bits_in_order(part: Tensor) -> Tensor:
    """[rows, blocks, 4] -> [rows, blocks * 32], weight i from bit i."""
    return torch.stack([(part >> i) & 1 for i in range(8)], dim=-1).flatten(1)


def _q4_0(b: Tensor) -> Unpacked:
    return Unpacked(_fields(b[..., 2:], 4, 16), _half(b[..., :2]))


def _q4_1(b: Tensor) -> Unpacked:
    return Unpacked(_fields(b[..., 4:], 4, 16), _half(b[..., :2]), _half(b[..., 2:4]))


def _q5_0(b: Tensor) -> Unpacked:
    return Unpacked(_fields(b[..., 6:], 4, 16) | (_bits_in_order(b[..., 2:6]) << 4), _half(b[..., :2]))


def _q5_1(b: Tensor) -> Unpacked:
    codes = _fields(b[..., 8:], 4, 16) | (_bits_in_order(b[..., 4:8]) << 4)
    return Unpacked(codes, _half(b[..., :2]), _half(b[..., 2:4]))


def _q8_0(b: Tensor) -> Unpacked:
    return Unpacked((b[..., 2:] ^ 0x80).flatten(1), _half(b[..., :2]))


def _q2_k(b: Tensor) -> Unpacked:
    parameters, steps = b[..., :16], (_half(b[..., 80:82]), _half(b[..., 82:84]))
    return Unpacked(_fields(b[..., 16:80], 2, 32), _signed(parameters & 15), -_signed(parameters >> 4), *steps)


def _q3_k(b: Tensor) -> Unpacked:
    low, high = b[..., 96:104], b[..., 104:108]
    scales = torch.cat((low & 15, low >> 4), -1)  # [rows, blocks, 16]
    scales = scales | (torch.cat([(high >> shift) & 3 for shift in (0, 2, 4, 6)], -1) << 4)
    codes = _fields(b[..., 32:96], 2, 32) | (_fields(b[..., :32], 1, 32) << 2)
    return Unpacked(codes, _signed(scales) - 32, None, _half(b[..., 108:110]))


def _six_bit(b: Tensor) -> tuple[Tensor, Tensor]:
    """The 12 bytes of scales and minima of Q4_K and Q5_K -> twice [rows, blocks, 8] uint8."""
    first, second, third = b[..., :4], b[..., 4:8], b[..., 8:12]
    scales = torch.cat((first & 63, (third & 15) | ((first >> 2) & 48)), -1)
    minima = torch.cat((second & 63, (third >> 4) | ((second >> 2) & 48)), -1)
    return scales, minima


def _q4_k(b: Tensor) -> Unpacked:
    scales, minima = _six_bit(b[..., 4:16])
    return Unpacked(
        _fields(b[..., 16:], 4, 32), _signed(scales), -_signed(minima), _half(b[..., :2]), _half(b[..., 2:4])
    )


def _q5_k(b: Tensor) -> Unpacked:
    scales, minima = _six_bit(b[..., 4:16])
    codes = _fields(b[..., 48:], 4, 32) | (_fields(b[..., 16:48], 1, 32) << 4)
    return Unpacked(codes, _signed(scales), -_signed(minima), _half(b[..., :2]), _half(b[..., 2:4]))


def _q6_k(b: Tensor) -> Unpacked:
    codes = _fields(b[..., :128], 4, 64) | (_fields(b[..., 128:192], 2, 32) << 4)
    return Unpacked(codes, _signed(b[..., 192:208]), None, _half(b[..., 208:210]))


def _iq4_xs(b: Tensor) -> Unpacked:
    low = torch.stack((b[..., 4:8] & 15, b[..., 4:8] >> 4), -1).flatten(2)  # [rows, blocks, 8]
    high = torch.stack([(b[..., 2:4] >> shift) & 3 for shift in (0, 2, 4, 6)], -1).flatten(2)
    scales = _signed(low | (high << 4)) - 32
    return Unpacked(_fields(b[..., 8:], 4, 16), scales, None, _half(b[..., :2]))


def _tq1_0(b: Tensor) -> Unpacked:
    """A byte is ceil(v 256 / 243); multiplying it by 3 pushes the digits of v out at the top, the highest first."""
    num_rows, num_blocks = b.shape[:2]
    parts = []
    for start, stop, num_digits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        powers = torch.stack([b[..., start:stop] * 3**i for i in range(num_digits)], 2)  # modulo 256
        parts.append(((powers.short() * 3) >> 8).to(torch.uint8).view(num_rows, num_blocks, -1))
    return Unpacked(torch.cat(parts, -1).flatten(1), _half(b[..., 52:54]))


def _tq2_0(b: Tensor) -> Unpacked:
    return Unpacked(_fields(b[..., :64], 2, 32), _half(b[..., 64:66]))


def _mxfp4(b: Tensor) -> Unpacked:
    return Unpacked(_fields(b[..., 1:], 4, 16), b[..., :1].contiguous().view(torch.float8_e8m0fnu))


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "Q4_0": Layout(4, 32, _q4_0, zero=8),
        "Q4_1": Layout(4, 32, _q4_1),
        "Q5_0": Layout(5, 32, _q5_0, zero=16),
        "Q5_1": Layout(5, 32, _q5_1),
        "Q8_0": Layout(8, 32, _q8_0, zero=128),
        "Q2_K": Layout(2, 16, _q2_k),
        "Q3_K": Layout(3, 16, _q3_k, zero=4),
        "Q4_K": Layout(4, 32, _q4_k),
        "Q5_K": Layout(5, 32, _q5_k),
        "Q6_K": Layout(6, 16, _q6_k, zero=32),
        "IQ4_NL": Layout(4, 32, _q4_0, table=IQ4),
        "IQ4_XS": Layout(4, 32, _iq4_xs, table=IQ4),
        "TQ1_0": Layout(2, 256, _tq1_0, table=TERNARY),
        "TQ2_0": Layout(2, 256, _tq2_0, table=TERNARY),
        "MXFP4": Layout(4, 32, _mxfp4, table=E2M1),
    }
)
