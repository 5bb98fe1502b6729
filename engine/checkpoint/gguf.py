"""GGUF files, as llama.cpp writes them: every tensor in a ggml type of its own (gguf_blocks.py).

Of the llama architecture, the rows of query and key heads stand in the order of the original Meta weights, whose RoPE
turns neighbouring channels; they are put back into the order of Hugging Face, whose RoPE turns channels half a head
apart:

    row h D + 2 i + j of the file = row h D + j D / 2 + i of the model,   i < D / 2, j < 2
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.checkpoint.errors import TensorError
from engine.checkpoint.gguf_blocks import to_term
from engine.checkpoint.gguf_file import BlockType
from engine.checkpoint.linear import read_bias
from engine.checkpoint.source import Source
from kernels.linear.weights import LinearWeights

SHOWN_TYPES = 3
UNPACKED_AT_ONCE = 1 << 24  # weights of an embedding, on a GPU


@dataclass(frozen=True)
class Gguf:
    """The reader of one GGUF model."""

    types: Mapping[str, BlockType]  # by tensor
    turned_heads: Mapping[str, int]  # how many heads the rows of layers with this last name are, where they are turned
    name: str = "gguf"

    def describe(self) -> str:
        """The types of most matrices, the commonest first: "GGUF Q4_K, Q6_K"."""
        matrices = Counter(block.name for name, block in self.types.items() if name.endswith("_proj.weight"))
        return "GGUF " + ", ".join(kind for kind, _ in matrices.most_common(SHOWN_TYPES))

    def linear(self, source: Source, name: str, shape: tuple[int, int], bias: bool) -> LinearWeights:
        term = to_term(self._turned(name, self._raw(source, name, shape)), self.types[f"{name}.weight"], name)
        found = read_bias(source, name, shape[0], bias)
        return LinearWeights((term,), bias=None if found is None else self._turned(name, found))

    def rows(
        self, source: Source, name: str, shape: tuple[int, int], target: tuple[torch.device, torch.dtype]
    ) -> Callable[[Tensor], Tensor]:
        """The lookup of an embedding: ids [num_tokens] -> [num_tokens, hidden] floating. The rows stay in the file, as
        blocks, and are unpacked exactly when they are wanted; on a GPU all are at once, to the target's dtype, for
        unpacking there takes some forty kernels a step and waits for them to see whether a block is damaged."""
        raw, block = self._raw(source, name, shape), self.types[f"{name}.weight"]
        device, dtype = target
        if device.type == "cpu":
            return lambda ids: to_term(raw.index_select(0, ids), block, name).dequantize()
        matrix = torch.empty(shape, dtype=dtype, device=device)
        for start in range(0, shape[0], rows_at_once := max(1, UNPACKED_AT_ONCE // shape[1])):
            rows = raw[start : start + rows_at_once].to(device)
            matrix[start : start + rows_at_once] = to_term(rows, block, name).dequantize()
        return lambda ids: matrix.index_select(0, ids)

    def _raw(self, source: Source, name: str, shape: tuple[int, int]) -> Tensor:
        """The rows as stored, [out, bytes of a row] uint8 or [out, in] floating."""
        tensor = f"{name}.weight"
        if tensor not in source:
            raise TensorError(f"{source.folder}: the model has no tensor {tensor!r}")
        block = self.types[tensor]
        width = shape[1] // block.weights * block.num_bytes
        stored = source.shape(tensor)
        if block.weights == 1:
            return source.take(tensor, shape)
        if shape[1] % block.weights or stored != (shape[0], width):
            found = [*stored[:-1], stored[-1] // block.num_bytes * block.weights]
            raise TensorError(f"tensor {tensor!r} has shape {found}, expected {list(shape)}")
        return source.tensor(tensor)

    def _turned(self, name: str, rows: Tensor) -> Tensor:
        heads = self.turned_heads.get(name.rsplit(".", 1)[-1])
        if heads is None:
            return rows
        if rows.shape[0] % (2 * heads):
            raise TensorError(f"layer {name!r} has {rows.shape[0]} rows, which are not {heads} heads of an even size")
        return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
