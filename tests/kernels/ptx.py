"""What the PTX in our Triton kernels means, for Triton's interpreter, which knows no inline assembly.

The few instructions that the kernels write are carried out on numpy arrays, as the PTX ISA 8 has them.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]
STATEMENT = re.compile(r"([a-z][\w.]*)\s+([^;]+);")
HALF, LOW = np.uint32(16), np.uint32(0xFFFF)
OPERAND = re.compile(r"\{[^}]*\}|[^,\s]+")


def run(assembly: str, inputs: Sequence[Words]) -> Words:
    """$0 once `assembly` has run on $1, $2 ... Raises ValueError for an instruction that is not known here."""
    registers: dict[str, Words] = {f"${i + 1}": value for i, value in enumerate(inputs)}
    registers["%lanemask_lt"] = np.uint32(0x7FFFFFFF) * np.ones_like(inputs[0])  # of lane 31, which has most bits
    for name, text in STATEMENT.findall(re.sub(r"^\{|\}$", "", re.sub(r"\.reg[^;]*;", "", assembly.strip()))):
        target, *operands = OPERAND.findall(text)
        registers[target] = _carry_out(name, [_value(operand, registers) for operand in operands])
    return registers["$0"]


def _value(operand: str, registers: dict[str, Words]) -> Words:
    if operand.startswith("{"):
        low, high = (registers[name.strip()] for name in operand.strip("{}").split(","))
        return (low & LOW) | (high << HALF)
    return registers[operand] if operand in registers else np.asarray(int(operand, 0), np.uint32)


def _carry_out(name: str, operands: list[Words]) -> Words:
    match name, operands:
        case "mov.b32" | "mov.u32", [a]:
            return a
        case "shr.u32", [a, b]:
            return a >> b
        case "or.b32", [a, b]:
            return a | b
        case "prmt.b32", [a, b, c]:
            return _permuted(a, b, c)
        case "fma.rn.bf16x2", [a, b, c]:
            low, high = (_fused(a >> at, b >> at, c >> at) for at in (np.uint32(0), HALF))
            return low | (high << HALF)
    raise ValueError(f"{name} of {len(operands)} operands is not known to tests/kernels/ptx.py")


def _permuted(a: Words, b: Words, order: Words) -> Words:
    bytes_of = [(word >> np.uint32(8 * i)) & 0xFF for word in (a, b) for i in range(4)]
    shape = np.broadcast_shapes(a.shape, b.shape, order.shape)
    found = np.zeros(shape, np.uint32)
    for i in range(4):
        nibble = (order >> np.uint32(4 * i)) & 0xF
        chosen = np.choose(np.broadcast_to(nibble & 7, shape), [np.broadcast_to(byte, shape) for byte in bytes_of])
        found |= np.where(nibble & 8, 0xFF * (chosen >> 7), chosen).astype(np.uint32) << np.uint32(8 * i)
    return found


def _fused(a: Words, b: Words, c: Words) -> Words:
    """a * b + c of the lower halves, rounded to the nearest bfloat16, ties to even. Subnormals are numbers like others.

    A product has 16 bits and is exact in float64, whose 53 bits then hold the sum of all numbers that the kernels add:
    of what lies further apart only the larger counts.
    """
    x, y, z = (((word & LOW) << HALF).view(np.float32).astype(np.float64) for word in (a, b, c))
    return _rounded(x * y + z)


def _rounded(exact: NDArray[np.float64]) -> Words:
    """The nearest bfloat16, in the lower half."""
    _, exponent = np.frexp(exact)
    unit = np.ldexp(1.0, np.maximum(exponent - 8, -133))  # of the last place; 2^-133 is the smallest subnormal
    near = np.rint(exact / unit) * unit  # ties to even
    found: Words = near.astype(np.float32).view(np.uint32) >> HALF
    return found


def create_inline_asm(
    _: Any, assembly: str, constraints: str, values: Sequence[Any], kinds: Sequence[Any], pure: bool, pack: int
) -> Any:
    """In place of InterpreterBuilder.create_inline_asm."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    assert (pure, pack, len(kinds)) == (True, 1, 1), constraints
    inputs = np.broadcast_arrays(*(value.data.astype(value.data.dtype.str.replace("i", "u")) for value in values))
    found = run(assembly, [value.astype(np.uint32) for value in inputs])
    return _Results([TensorHandle(found.view(np.int32), tl.int32)])


class _Results(list[Any]):
    """What the compiler's call gives: an operation with results."""

    def get_result(self, i: int) -> Any:
        return self[i]
