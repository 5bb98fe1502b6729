"""Headers of GGUF files: what is refused, and that nothing a header says makes the reader run away."""

import random
import struct
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint.errors import CheckpointError, FilesError
from engine.checkpoint.gguf_file import SCALARS, read_header, read_headers, shard_paths
from engine.checkpoint.gguf_source import GgufSource, public_name

FOLDER = Path(__file__).parents[2] / "fixtures" / "gguf"
U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def setting(name: str, kind: int, value: Any) -> bytes:
    body = text(value) if kind == STRING else struct.pack(f"<{SCALARS[kind]}", value)
    return text(name) + struct.pack("<I", kind) + body


def tensor(name: str, dims: Sequence[int], kind: int, offset: int = 0) -> bytes:
    """dims: the innermost first."""
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def write(
    path: Path,
    settings: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    counts: tuple[int, int] | None = None,
    data: int = 4096,
) -> Path:
    """counts: of tensors and settings, where the header is to lie about them."""
    num_tensors, num_settings = counts or (len(tensors), len(settings))
    head = b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_settings) + b"".join(settings) + b"".join(tensors)
    path.write_bytes(head + bytes(-len(head) % 32 + data))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def test_a_header_is_read(path: Path) -> None:
    """Dimensions stand innermost first; ours last. Offsets count from the aligned end of the header."""
    numbers = text("n") + struct.pack("<IIQ3i", ARRAY, 5, 3, 1, -2, 3)
    words = text("w") + struct.pack("<IIQ", ARRAY, STRING, 2) + text("▁a") + text("")
    settings = [setting("a", U32, 7), setting("b", F32, 0.5), setting("c", BOOL, True), setting("d", STRING, "é")]
    write(path, [*settings, numbers, words], [tensor("x", (32, 3), 2), tensor("y", (4,), 0, 64)])
    header = read_header(path)
    assert header.settings.integer("a") == 7
    assert header.settings.number("b") == 0.5
    assert header.settings.flag("c", False) is True
    assert header.settings.text("d") == "é"
    assert header.settings.array("n", int) == [1, -2, 3]
    assert header.settings.array("w", str) == ["▁a", ""]
    x, y = header.tensors["x"], header.tensors["y"]
    assert (x.shape, x.type.name, x.num_bytes) == ((3, 32), "Q4_0", 3 * 18)
    assert y.start - x.start == 64
    assert x.start == path.stat().st_size - 4096


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (17, "IQ2_XS: a codebook type that is not served; use a file of Q2_K"),
        (19, "IQ1_S: a codebook type"),
        (40, "NVFP4, which is not served"),
        (24, "I8, in which no weights are served"),
        (99, "type 99, which llama.cpp does not define: a fork's own"),
        (50, "type 50, which is not known; supported are F32, F16, Q4_0"),
    ],
)
def test_types_are_refused_by_name(kind: int, message: str, path: Path) -> None:
    """A user must learn which file to fetch in its place."""
    with pytest.raises(FilesError, match=message):
        read_header(write(path, [], [tensor("blk.0.ffn_up.weight", (256, 2), kind)]))


HUGE = 1 << 60


@pytest.mark.parametrize(
    ("settings", "tensors", "counts", "message"),
    [
        ([], [], (HUGE, 0), "too short for as much as it announces"),
        ([], [], (0, HUGE), "too short for as much as it announces"),
        ([text("a") + struct.pack("<IQ", STRING, HUGE)], [], None, "too short for a string"),
        ([struct.pack("<Q", HUGE)], [], (0, 1), "too short for a string"),
        ([text("a") + struct.pack("<IIQ", ARRAY, U32, HUGE)], [], None, "too short for a:"),
        ([text("a") + struct.pack("<IIQ", ARRAY, STRING, HUGE)], [], None, "too short for a:"),
        ([text("a") + struct.pack("<IIQ", ARRAY, ARRAY, 1)], [], None, "an array of type 9, which is not supported"),
        ([text("a") + struct.pack("<I", 77)], [], None, "'a' is of type 77, which GGUF does not have"),
        ([setting("a", U32, 1), setting("a", U32, 2)], [], None, "setting 'a' stands there twice"),
        ([setting("general.alignment", U32, 48)], [], None, "general.alignment is 48, expected a power of two"),
        ([setting("general.alignment", U32, 0)], [], None, "general.alignment is 0"),
        ([], [tensor("x", (HUGE, HUGE), 0)], None, "'x' ends at byte .* of a file of"),
        ([], [tensor("x", (1025,), 0)], None, "truncated or damaged; download it again"),
        ([], [tensor("x", (32,), 0, HUGE)], None, "'x' ends at byte"),
        ([], [tensor("x", (32,), 0, 8)], None, "'x' does not start at a multiple of 32 bytes"),
        ([], [tensor("x", (0, 4), 0)], None, r"'x' has shape \[4, 0\]"),
        ([], [tensor("x", (33, 4), 2)], None, r"'x' has shape \[4, 33\], but Q4_0 packs 32 a block"),
        ([], [tensor("x", (), 0)], None, "'x' has 0 dimensions, expected 1 to 4"),
        ([], [tensor("x", (1,) * 5, 0)], None, "'x' has 5 dimensions"),
        ([], [tensor("x", (8,), 0), tensor("x", (8,), 0)], None, "'x' stands there twice"),
    ],
)
def test_absurd_headers_are_refused(
    settings: list[bytes], tensors: list[bytes], counts: tuple[int, int] | None, message: str, path: Path
) -> None:
    """Bug: a count of 2^60 that is believed until the memory is gone."""
    with pytest.raises(FilesError, match=message):
        read_header(write(path, settings, tensors, counts))


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"", "is truncated: it has no whole GGUF header"),
        (b"GGUF" + struct.pack("<IQ", 3, 0), "is truncated"),
        (b"GGML" + bytes(60), "starts with b'GGML', not with b'GGUF'"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(32), "it is big-endian, which is not supported"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0) + bytes(32), "GGUF version 1 is not supported"),
    ],
)
def test_other_files_are_named(start: bytes, message: str, path: Path) -> None:
    path.write_bytes(start)
    with pytest.raises(FilesError, match=message):
        read_header(path)


def test_settings_of_another_kind_are_named(path: Path) -> None:
    """ "llama.block_count" as a string must not become a loop over its letters."""
    write(path, [setting("a", STRING, "x"), setting("b", U32, 1), setting("c", F32, float("nan"))])
    found = read_header(path).settings
    for read, message in (
        (lambda: found.integer("a"), "a must be an integer, found 'x'"),
        (lambda: found.flag("b", True), "b must be true or false, found 1"),
        (lambda: found.number("c"), "c must be a finite number, found nan"),
        (lambda: found.text("b"), "b must be a string"),
        (lambda: found.array("b", int), "b must be an array of int"),
        (lambda: found.integer("z"), "has no z, which the model needs"),
    ):
        with pytest.raises(FilesError, match=message):
            read()


def test_parts_of_a_split_model_are_found_from_any_of_them(tmp_path: Path) -> None:
    """Hugging Face lists them all; users name any. One that is missing would show as missing tensors."""
    parts = [FOLDER / f"split-0000{i}-of-00002.gguf" for i in (1, 2)]
    assert shard_paths(parts[1]) == shard_paths(parts[0]) == tuple(parts)
    assert set(GgufSource(read_headers(parts[1])).names()) == set(GgufSource(read_headers(parts[0])).names())
    (tmp_path / parts[0].name).write_bytes(parts[0].read_bytes())
    with pytest.raises(FilesError, match=r"split-00002-of-00002\.gguf is missing"):
        read_headers(tmp_path / parts[0].name)
    renamed = tmp_path / "model.gguf"
    renamed.write_bytes(parts[0].read_bytes())
    with pytest.raises(FilesError, match="one of 2 files, but its name says 1"):
        read_headers(renamed)


def test_two_parts_with_one_tensor_are_refused(tmp_path: Path) -> None:
    for i in (1, 2):
        count = [text("split.count") + struct.pack("<IH", 2, 2)]
        write(tmp_path / f"m-0000{i}-of-00002.gguf", count, [tensor("x", (8,), 0)])
    with pytest.raises(FilesError, match=r"'x' is in both m-00001-of-00002\.gguf and m-00002-of-00002\.gguf"):
        read_headers(tmp_path / "m-00001-of-00002.gguf")


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output.weight", "lm_head.weight"),
        ("blk.12.ffn_norm.weight", "model.layers.12.post_attention_layernorm.weight"),
        ("blk.0.attn_k.bias", "model.layers.0.self_attn.k_proj.bias"),
        ("blk.0.ffn_gate_inp.weight", "blk.0.ffn_gate_inp.weight"),  # stays, and is named as surplus
        ("rope_freqs.weight", "rope_freqs.weight"),
    ],
)
def test_names(name: str, public: str) -> None:
    assert public_name(name) == public


@pytest.mark.parametrize("name", ["types.gguf", "bpe.gguf"])
def test_mutated_headers_end_in_an_error_or_a_header(name: str, path: Path) -> None:
    """Bug: a damaged length that is allocated, or a damaged count that is looped over. Bytes of the header are replaced
    and cut out; whatever results is read, with its arrays, or refused, in bounded memory."""
    chance = random.Random(0)
    whole = (FOLDER / name).read_bytes()
    header_bytes = min(4000, len(whole))
    tracemalloc.start()
    started = time.monotonic()
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 2, 8))):
            at = chance.randrange(4, min(header_bytes, len(data)))
            kind = chance.randrange(4)
            if kind == 0:
                data[at] = chance.randrange(256)
            elif kind == 1:
                data[at : at + 8] = struct.pack("<Q", chance.choice((0, 1, HUGE, 2**63, 2**64 - 1)))
            elif kind == 2:
                del data[at : at + chance.randrange(1, 9)]
            else:
                del data[chance.randrange(24, max(25, len(data))) :]
        path.write_bytes(data)
        try:
            header = read_header(path)
            GgufSource((header,))
            for setting_name in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
                if setting_name in header.settings:
                    header.settings.array(setting_name, str)
        except CheckpointError:
            continue
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * len(whole) + (1 << 20)
    assert time.monotonic() - started < 120  # a loop over 2^60 would not end
