"""The tensors of a GGUF model under the names that Hugging Face gives them, memory-mapped.

Blocks come as bytes, [rows, bytes of a row] uint8; types without blocks as they are.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from engine.checkpoint.errors import FilesError
from engine.checkpoint.gguf_file import BlockType, Header, StoredTensor
from engine.checkpoint.source import Progress, Source

DTYPES = MappingProxyType({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16})
WHOLE = MappingProxyType({"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"})
OF_LAYERS = MappingProxyType(
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
)
NAME = re.compile(r"(blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.(?P<kind>weight|bias)")


def public_name(name: str) -> str:
    """ "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"; a name that has no such form, as it is."""
    match = NAME.fullmatch(name)
    if match is None:
        return name
    part = (WHOLE if match["layer"] is None else OF_LAYERS).get(match["part"])
    if part is None:
        return name
    prefix = "" if match["layer"] is None else f"model.layers.{int(match['layer'])}."
    return f"{prefix}{part}.{match['kind']}"


class GgufSource(Source):
    """The tensors of a model's files. Raises FilesError when two of them come to the same name."""

    def __init__(self, headers: Sequence[Header], on_progress: Progress | None = None) -> None:
        self._headers = tuple(headers)
        super().__init__(headers[0].path.parent, on_progress)

    def block_types(self) -> dict[str, BlockType]:
        """By public name."""
        return {public_name(name): stored.type for header in self._headers for name, stored in header.tensors.items()}

    def _open_all(self) -> None:
        for header in self._headers:
            handle = _File(header)
            self._handles[header.path.name] = handle
            for name in handle.stored:
                if name in self._file_of:
                    raise FilesError(f"{header.path}: two tensors of the model are {name!r}")
                self._file_of[name] = header.path.name


@dataclass(frozen=True)
class _Slice:
    """What safetensors tells of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: str

    def get_shape(self) -> tuple[int, ...]:
        return self.shape

    def get_dtype(self) -> str:
        return self.dtype


class _File:
    """A mapped file with the methods of a safetensors handle."""

    def __init__(self, header: Header) -> None:
        self.stored: Mapping[str, StoredTensor] = {public_name(name): t for name, t in header.tensors.items()}
        if len(self.stored) != len(header.tensors):
            raise FilesError(f"{header.path}: two of its tensors have names that mean the same")
        size = header.path.stat().st_size
        self._bytes = torch.from_file(str(header.path), shared=False, size=size, dtype=torch.uint8)

    def get_tensor(self, name: str) -> Tensor:
        stored, slice_ = self.stored[name], self.get_slice(name)
        raw = self._bytes[stored.start : stored.start + stored.num_bytes]
        return raw.view(DTYPES.get(stored.type.name, torch.uint8)).view(slice_.shape)

    def get_slice(self, name: str) -> _Slice:
        stored = self.stored[name]
        if stored.type.name in DTYPES:
            return _Slice(stored.shape, stored.type.name)
        *outer, width = stored.shape
        return _Slice((*outer, width // stored.type.weights * stored.type.num_bytes), "U8")
