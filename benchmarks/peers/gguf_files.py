"""GGUF files of public shapes with random weights. Runs in the peer's interpreter: it needs gguf and numpy.

A block of each type is random codes and a constant float16 scale, chosen so that weights have a standard deviation of
1 / sqrt(inputs): values stay in the range of a trained model, and nothing overflows or is denormal.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from benchmarks.peers.protocol import Refused, Setup
from benchmarks.peers.vocabulary import SPACE, words
from benchmarks.shapes import BIASED, Shape

Bytes = npt.NDArray[np.uint8]
NAMES = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
HEAD = "Q8_0"  # the embedding, which is the output head too
CONTEXT_LEN = 32_768


def _random(rng: np.random.Generator, num_blocks: int, width: int) -> Bytes:
    return np.frombuffer(rng.bytes(num_blocks * width), np.uint8).reshape(num_blocks, width)


def _trits(rng: np.random.Generator, num_blocks: int, width: int) -> Bytes:
    """Bytes of TQ1_0: five trits as ceil(256 v / 243), v < 243. The last four bytes hold four, which any v does."""
    valid = ((np.arange(243) * 256 + 242) // 243).astype(np.uint8)
    drawn: Bytes = valid[rng.integers(0, 243, (num_blocks, width), np.uint8)]
    return drawn


def _trit_pairs(rng: np.random.Generator, num_blocks: int, width: int) -> Bytes:
    """Bytes of TQ2_0: four codes of two bits, each below 3."""
    valid = np.array([b for b in range(256) if all((b >> s) & 3 < 3 for s in (0, 2, 4, 6))], np.uint8)
    drawn: Bytes = valid[rng.integers(0, len(valid), (num_blocks, width), np.uint8)]
    return drawn


@dataclass(frozen=True)
class BlockType:
    """How a block of a ggml type is laid out: constant float16 scales and random codes, in order."""

    parts: tuple[tuple[str, int], ...]  # ("scale", bytes) or ("codes", bytes)
    spread: float  # standard deviation of a weight at scale 1
    codes: Callable[[np.random.Generator, int, int], Bytes] = _random


TYPES = {
    "Q8_0": BlockType((("scale", 2), ("codes", 32)), 74.0),
    "Q4_0": BlockType((("scale", 2), ("codes", 16)), 4.6),
    "Q5_0": BlockType((("scale", 2), ("codes", 20)), 9.2),
    "IQ4_NL": BlockType((("scale", 2), ("codes", 16)), 70.0),
    "Q4_K": BlockType((("scale", 4), ("codes", 140)), 300.0),  # d, dmin; 6-bit scales and minima; codes
    "Q2_K": BlockType((("codes", 80), ("scale", 4)), 15.0),  # 4-bit scales and minima, codes; d, dmin
    "TQ1_0": BlockType((("codes", 52), ("scale", 2)), 0.82, _trits),
    "TQ2_0": BlockType((("codes", 64), ("scale", 2)), 0.82, _trit_pairs),
}
DEFAULT_TYPES = {8: "Q8_0", 4: "Q4_0", 2: "Q2_K", 1.6: "TQ2_0"}  # TQ1_0 is smaller and slower
# What llama.cpp's quantizer stores instead where the inputs are no multiple of a type's block of 256 (as seen, 0.3.36).
FALLBACKS = {"Q4_K": "Q5_0", "Q2_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0"}


def wanted_type(setup: Setup) -> str:
    """Raises Refused when no default is known, or the type is not one that can be written."""
    wanted = setup.variant.upper() or DEFAULT_TYPES.get(setup.bits, "")
    if not wanted:
        raise Refused(f"llama.cpp has no usual format of {setup.bits} bits: name one with --peer-format")
    if wanted not in TYPES:
        raise Refused(f"{wanted} files cannot be written here: use one of {', '.join(TYPES)}")
    return wanted


def stored_type(wanted: str, num_inputs: int) -> str:
    """The type that a matrix with so many inputs is stored in."""
    return wanted if num_inputs % block_size(wanted) == 0 else FALLBACKS[wanted]


def block_size(type_name: str) -> int:
    size: int = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]][0]
    return size


def matrix_bytes(type_name: str, rows: int, columns: int) -> int:
    weights, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    return rows * columns // int(weights) * int(num_bytes)


def random_matrix(type_name: str, rows: int, columns: int, rng: np.random.Generator) -> Bytes:
    """[rows, bytes of a row] of blocks of the type."""
    block = TYPES[type_name]
    num_blocks = rows * columns // block_size(type_name)
    scale = np.float16(1 / (block.spread * columns**0.5)).tobytes()
    pieces = []
    for kind, width in block.parts:
        if kind == "scale":
            constant = np.frombuffer(scale * (width // 2), np.uint8)
            pieces.append(np.broadcast_to(constant, (num_blocks, width)))
        else:
            pieces.append(block.codes(rng, num_blocks, width))
    return np.concatenate(pieces, axis=1).reshape(rows, -1)


def write_gguf(path: Path, shape: Shape, wanted: str, with_vocabulary: bool = False) -> None:
    """Write a model of the shape with its matrices in `wanted`, its embedding in Q8_0, norms and biases in F32.

    What is never given text needs no vocabulary; a server does.
    """
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "qwen2" if shape.qkv_bias else "llama")
    _add_metadata(writer, shape)
    if with_vocabulary:
        _add_vocabulary(writer, shape.vocab)
    else:
        writer.add_tokenizer_model("no_vocab")
    _add_matrix(writer, "token_embd.weight", HEAD, (shape.vocab, shape.hidden), rng)
    writer.add_tensor("output_norm.weight", np.ones(shape.hidden, np.float32))
    for i in range(shape.num_layers):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", np.ones(shape.hidden, np.float32))
        for role, (rows, columns) in shape.linears().items():
            name = f"blk.{i}.{NAMES[role]}"
            _add_matrix(writer, f"{name}.weight", stored_type(wanted, columns), (rows, columns), rng)
            if shape.qkv_bias and role in BIASED:
                writer.add_tensor(f"{name}.bias", np.zeros(rows, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_matrix(writer: Any, name: str, type_name: str, size: tuple[int, int], rng: np.random.Generator) -> None:
    blocks = random_matrix(type_name, *size, rng)
    writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType[type_name])


def _add_metadata(writer: Any, shape: Shape) -> None:
    writer.add_context_length(CONTEXT_LEN)
    writer.add_vocab_size(shape.vocab)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(500_000.0)
    writer.add_layer_norm_rms_eps(1e-5)


def _add_vocabulary(writer: Any, size: int) -> None:
    writer.add_tokenizer_model("gpt2")  # byte-level, as that of Llama 3
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words(size))
    writer.add_token_types([gguf.TokenType.NORMAL] * size)
    writer.add_token_merges([f"{SPACE} 0"])  # llama.cpp insists on having some
