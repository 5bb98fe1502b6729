"""Damaged and hostile checkpoints: every one ends in a CheckpointError or UnsupportedModel that names what is wrong.

Files come from the internet. Whatever they hold, opening and reading them may not crash, hang, ask for memory by what a
header claims, read outside the folder, or serve scales that are not numbers.
"""

import json
import shutil
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoint.errors import CheckpointError, FilesError, TensorError
from engine.checkpoint.format import detect
from engine.checkpoint.fp_quant import BACKWARD
from engine.checkpoint.hqq import INFORMATIONAL_PARTS
from engine.checkpoint.source import Source
from engine.loading import open_checkpoint
from engine.models.config import UnsupportedModel, read_json
from engine.models.registry import describe
from tests.engine.checkpoint.worlds import ALL, FIXTURES, QUERY, expected

REFUSALS = (CheckpointError, UnsupportedModel)
ONE_FILE = [name for name in ALL if (FIXTURES / name / "model.safetensors").is_file()]
MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
# What a field of a config may hold that nobody wrote by hand.
JUNK: tuple[Any, ...] = (None, True, -1, 0, 7, 10**30, 1e300, "", "../x", [], [[1]], {}, {"x": {"y": [None]}}, ["(", 3])
# Tensors that a layer may go without: in order, and rows as they are.
OPTIONAL = frozenset(
    {
        "bias",
        "channel_wise",
        "g_idx",
        "input_scale",
        "quant_scale",
        "quant_zero",
        "weight_format",
        "weight_g_idx",
        "weight_zero_point",
    }
)
CODES = frozenset({"W_q", "weight"})  # bytes, which may be stored as floats
CLAIMED = 10 << 30  # bytes of a file that holds next to none
MAX_GROWTH = 64 << 20  # bytes of memory that reading a checkpoint below 1 MB may take


def copy(name: str, folder: Path) -> Path:
    """The fixture without its proofs."""
    folder.mkdir(exist_ok=True)
    for path in (FIXTURES / name).iterdir():
        if not path.name.startswith("expected"):
            shutil.copyfile(path, folder / path.name)
    return folder


def read_query(folder: Path, name: str, config: dict[str, Any] | None = None) -> list[str]:
    """Read one layer as the model would, and look at its weights. Returns the tensors that were read."""
    source = Source(folder)
    form = detect(read_json(folder) if config is None else config, source)
    weight = expected(FIXTURES / name)[QUERY]
    form.linear(source, QUERY, (weight.shape[0], weight.shape[1]), f"{QUERY}.bias" in source).dequantize()
    return [tensor for tensor in source.names() if tensor not in source.unread()]


def replace_tensor(folder: Path, fixture: str, name: str, tensor: Tensor | None) -> None:
    """Write the fixture's file with another tensor of this name, or none; the header's metadata stays."""
    content = (FIXTURES / fixture / MODEL).read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    tensors = load_file(FIXTURES / fixture / MODEL) | ({} if tensor is None else {name: tensor.contiguous()})
    save_file(
        {key: value for key, value in tensors.items() if tensor is not None or key != name},
        folder / MODEL,
        header.get("__metadata__"),
    )


def damaged(tensor: Tensor, numbers: bool) -> Iterator[tuple[str, Tensor]]:
    """Tensors of another shape or type, or of values that are no numbers."""
    yield "empty", tensor.new_zeros(0)
    yield "more dimensions", tensor.unsqueeze(0).unsqueeze(0)
    yield "twice", torch.cat([tensor.reshape(-1)] * 2)
    yield "another type", tensor.to(torch.complex64 if tensor.dtype == torch.float64 else torch.float64)
    if numbers and tensor.is_floating_point() and tensor.dtype.itemsize > 1:
        yield "not a number", torch.full_like(tensor, torch.nan)
        yield "infinite", torch.full_like(tensor, torch.inf)


@pytest.mark.parametrize("name", [name for name in ONE_FILE if QUERY in expected(FIXTURES / name)])
def test_damaged_tensors_are_refused(name: str, tmp_path: Path) -> None:
    """Each tensor of a layer in turn: removed, of another shape, of another type, not finite."""
    folder = copy(name, tmp_path)
    stored = load_file(folder / MODEL)
    for key in read_query(folder, name):
        part = key.split(".")[-1]
        if part in (*INFORMATIONAL_PARTS, BACKWARD) or "_proj." not in key:
            continue  # how hqq held a layer in memory, what FP-Quant trains with, scales of a cache: read over
        if part not in OPTIONAL:
            assert_refused(folder, name, key, None, "removed")
        for what, tensor in damaged(stored[key], numbers=part not in CODES):
            assert_refused(folder, name, key, tensor, what)


def assert_refused(folder: Path, fixture: str, key: str, tensor: Tensor | None, what: str) -> None:
    replace_tensor(folder, fixture, key, tensor)
    with suppress(*REFUSALS):
        read_query(folder, fixture)
        pytest.fail(f"{key}, {what}, was read")


def fields(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything that a JSON value holds."""
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in inside:
        yield (*path, key)
        yield from fields(value, (*path, key))


def with_junk(config: dict[str, Any], path: tuple[Any, ...], junk: Any) -> dict[str, Any]:
    changed: dict[str, Any] = json.loads(json.dumps(config))
    node: Any = changed
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = junk
    return changed


CONFIGURED = (
    "auto-round-gptq-3bit-asym-extra",
    "awq-gemv-fast-4bit-g32",
    "bnb-int8",
    "bnb-nf4-nested-ragged-qwen2",
    "ct-mixed-groups-qwen2",
    "fp-quant-nvfp4",
    "gptq-v1-dynamic",
    "quip-e8p12rvq4b",
    "torchao-intx-4bit",
)


@pytest.mark.parametrize("name", CONFIGURED)
def test_quantization_configs_of_any_json_are_read_or_refused(name: str) -> None:
    """Bug: an AttributeError, or worse a RecursionError, for a list where a reader expects an object."""
    config = json.loads((FIXTURES / name / "config.json").read_text())
    quantization = {key: config[key] for key in ("quantization_config", "quip_params") if key in config}
    for path in fields(quantization):
        for junk in JUNK:
            with suppress(*REFUSALS):
                read_query(FIXTURES / name, name, with_junk(quantization, path, junk))


def test_model_configs_of_any_json_are_read_or_refused(tmp_path: Path) -> None:
    """Bug: a division by zero heads, a list of 10^30 layers, a rotation by a word."""
    config = json.loads((FIXTURES / "bnb-int8" / "config.json").read_text())
    del config["quantization_config"]
    for path in fields(config):
        for junk in JUNK:
            (tmp_path / "config.json").write_text(json.dumps(with_junk(config, path, junk)))
            with suppress(*REFUSALS):
                described = describe(tmp_path).config
                assert described.num_layers < 1 << 13


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "[]", "1", '"x"', "\xff\xfe", "NaN"])
@pytest.mark.parametrize("file", ["config.json", "quantize_config.json", INDEX])
def test_files_that_are_no_json_object_are_named(file: str, content: str, tmp_path: Path) -> None:
    """Bug: 100,000 brackets end in a RecursionError, which nobody catches."""
    folder = copy("gptq-v1-4bit-ragged", tmp_path)
    if file == INDEX:
        (folder / MODEL).unlink()
    if file == "quantize_config.json":
        (folder / "config.json").write_text(json.dumps(without_quantization(folder)))
    (folder / file).write_text(content, encoding="latin-1")
    with pytest.raises(REFUSALS, match=file.replace(".", r"\.")):
        open_checkpoint(folder)


def without_quantization(folder: Path) -> dict[str, Any]:
    config = read_json(folder)
    del config["quantization_config"]
    return config


@pytest.mark.parametrize(
    "shard", ["../../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", INDEX, "", "."]
)
def test_an_index_points_into_its_folder(shard: str, tmp_path: Path) -> None:
    """A path that leaves the folder would read another user's files."""
    folder = copy("gptq-v1-4bit-ragged", tmp_path / "model")
    (folder / MODEL).rename(tmp_path / "x.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {f"{QUERY}.qweight": shard}}))
    with pytest.raises(FilesError, match="not a safetensors file inside the folder"):
        Source(folder)


def test_shards_that_are_links_to_themselves_are_refused(tmp_path: Path) -> None:
    """Two links that name each other have no end."""
    one, two = tmp_path / "model-1.safetensors", tmp_path / "model-2.safetensors"
    one.symlink_to(two)
    two.symlink_to(one)
    with pytest.raises(FilesError, match=r"model-1\.safetensors"):
        Source(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": one.name}}))
    with pytest.raises(FilesError, match=r"model-1\.safetensors"):
        Source(tmp_path)


def write_claim(path: Path, header: dict[str, Any], size: int) -> None:
    """A safetensors file of `size` bytes, of which only the header takes room on disk."""
    content = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        file.truncate(size)


def peak_memory() -> int:
    """Bytes this process has had at most since the mark was reset."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel keeps no mark of memory")
@pytest.mark.parametrize("truncated", [True, False])
def test_a_header_that_claims_10_gigabytes_takes_none(truncated: bool, tmp_path: Path) -> None:
    """Bug: memory is asked for by what a header says, before anybody knows whether the model needs it."""
    folder = copy("gptq-v1-4bit-ragged", tmp_path)
    (folder / MODEL).unlink()
    part = CLAIMED // 3 // 4 * 4
    header = {
        f"{QUERY}.{name}": {"dtype": "I32", "shape": [part // 4, 1], "data_offsets": [i * part, (i + 1) * part]}
        for i, name in enumerate(("qweight", "qzeros", "scales"))
    }
    length = 8 + len(json.dumps(header).encode())
    write_claim(folder / MODEL, header, length + (1 << 10 if truncated else 3 * part))
    with suppress(OSError):  # without leave to reset it, the mark of other tests stands and this one sees less
        Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory()
    with pytest.raises(FilesError if truncated else TensorError, match=MODEL if truncated else r"q_proj\.qweight'"):
        read_query(folder, "gptq-v1-4bit-ragged")
    assert peak_memory() - before < MAX_GROWTH


def test_files_cut_anywhere_are_refused(tmp_path: Path) -> None:
    """A download may stop at any byte."""
    folder = copy("bnb-int8", tmp_path)
    content = (folder / MODEL).read_bytes()
    for length in [*range(0, 64, 7), len(content) // 2, len(content) - 1]:
        (folder / MODEL).write_bytes(content[:length])
        with pytest.raises(FilesError, match=r"model\.safetensors is not a whole safetensors file"):
            open_checkpoint(folder)


def test_headers_with_flipped_bytes_are_read_or_refused(tmp_path: Path) -> None:
    """A header damaged on the way must not be believed where it still parses."""
    name = "bnb-nf4-nested-ragged-qwen2"
    folder = copy(name, tmp_path)
    content = bytearray((folder / MODEL).read_bytes())
    size = struct.unpack("<Q", content[:8])[0]
    random = torch.Generator().manual_seed(1)
    for position in torch.randint(0, 8 + size, (150,), generator=random).tolist():
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        (folder / MODEL).write_bytes(flipped)
        with suppress(*REFUSALS):
            read_query(folder, name)
