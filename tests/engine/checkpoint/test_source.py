"""Folders of safetensors: which files are read, what is refused, and what was left over."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.checkpoint import mapping
from engine.checkpoint.errors import CheckpointError, FilesError, TensorError
from engine.checkpoint.source import Source

INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def shards(folder: Path, files: dict[str, dict[str, Tensor]], weight_map: Any = None) -> Path:
    """Write files and, unless `weight_map` is False, an index of what they hold."""
    for file, tensors in files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        save_file(tensors, folder / file)
    if weight_map is None:
        weight_map = {name: file for file, tensors in files.items() for name in tensors}
    if weight_map is not False:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_shards_are_one_table(tmp_path: Path) -> None:
    """A tensor must be found wherever the index put it, and files walked one after the other."""
    source = Source(shards(tmp_path, {ONE: {"a": torch.ones(2), "b": torch.ones(3)}, TWO: {"c": torch.ones(4, 5)}}))
    assert list(source.shards()) == [(ONE, ("a", "b")), (TWO, ("c",))]
    assert (source.shape("c"), source.dtype("c"), source.total_bytes) == ((4, 5), torch.float32, 100)
    assert torch.equal(source.tensor("c"), torch.ones(4, 5))


def test_reading_copies_nothing(tmp_path: Path) -> None:
    """A copy for each tensor would need the model's memory twice."""
    source = Source(shards(tmp_path, {"model.safetensors": {"a": torch.ones(1000)}}, False))
    first = source.tensor("a")
    assert first.data_ptr() == source.tensor("a").data_ptr()
    source.close()
    assert first.sum() == 1000


def test_where_a_file_lies_is_looked_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a thousand lines of mappings read anew for each tensor, which were a tenth of the loading of a 1B model."""
    for file in ("a", "b"):
        save_file({f"{file}{i}": torch.full((64, 64), i + 1.0) for i in range(3)}, tmp_path / f"{file}.safetensors")
    looked: list[Path] = []
    look = mapping._mapping_around

    def looked_up(start: int, stop: int, file: Path) -> range | None:
        looked.append(file)
        return look(start, stop, file)

    monkeypatch.setattr(mapping, "_mapping_around", looked_up)
    with Source(tmp_path) as source:
        tensors = [source.tensor(name) for name in source.names()]
        source.release()
        assert [path.name for path in looked] == ["a.safetensors", "b.safetensors"]
        assert [tensor.mean().item() for tensor in tensors] == [1, 2, 3] * 2  # read again


def test_progress_counts_every_tensor_once(tmp_path: Path) -> None:
    """A tied head is read twice; a bar beyond 100 % looks like a bug, and is one."""
    seen: list[tuple[int, int]] = []
    folder = shards(tmp_path, {"model.safetensors": {"a": torch.ones(2), "b": torch.ones(6)}}, False)
    with Source(folder, lambda done, total: seen.append((done, total))) as source:
        for name in ("a", "a", "b"):
            source.tensor(name)
    assert seen == [(8, 32), (32, 32)]


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["model.safetensors", "consolidated.safetensors"], "model.safetensors"),
        (["gptq_model-4bit-128g.safetensors", "adapter_model.safetensors"], "gptq_model-4bit-128g.safetensors"),
        (["a.safetensors", "b.safetensors"], "a.safetensors"),
    ],
)
def test_files_of_other_names_and_other_models(files: list[str], found: str, tmp_path: Path) -> None:
    """AutoGPTQ names its file after the settings; Mistral ships a second copy of the model beside the first."""
    source = Source(shards(tmp_path, {file: {file: torch.ones(1)} for file in files}, False))
    assert next(source.shards())[0] == found


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_pickles_are_never_opened(suffix: str, tmp_path: Path) -> None:
    """Unpickling runs whatever code the file asks for."""

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    (tmp_path / f"pytorch_model{suffix}").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(FilesError, match=r"save_pretrained\(new_folder, safe_serialization=True\)"):
        Source(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_an_empty_folder_says_what_is_missing(tmp_path: Path) -> None:
    """The hub's pickles are not downloaded, so the folder may hold nothing that hints at them."""
    with pytest.raises(FilesError, match=r"no \*\.safetensors"):
        Source(tmp_path)
    with pytest.raises(FilesError, match="not a folder"):
        Source(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": ONE, "c": "model-00003-of-00003.safetensors"}, "model-00003-of-00003.safetensors, named by .* missing"),
        ({"a": ONE, "c": ONE}, f"'c' in {ONE}, which does not hold it"),
        ({"a": ONE, "c": "../secret.safetensors"}, "not a safetensors file inside the folder"),
        ({"a": ONE, "c": "/etc/passwd"}, "not a safetensors file inside the folder"),
        ({"a": ONE, "c": "..\\secret.safetensors"}, "not a safetensors file inside the folder"),
        ({"a": ONE, "c": "pytorch_model.bin"}, "not a safetensors file inside the folder"),
        ({"a": 1}, "not an index of tensors"),
        ([], "not an index of tensors"),
        ({}, "names no tensor"),
    ],
)
def test_an_index_that_does_not_fit_its_files(weight_map: Any, message: str, tmp_path: Path) -> None:
    """An index comes from the internet: it may be stale, cut short, or point outside the folder."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"c": torch.ones(1)}, tmp_path / "secret.safetensors")
    with pytest.raises(FilesError, match=message):
        Source(shards(folder, {ONE: {"a": torch.ones(2)}}, weight_map))


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    """Which of the two is the model's would depend on the order of the files."""
    with pytest.raises(FilesError, match=f"'a' is in both {ONE} and {TWO}"):
        Source(shards(tmp_path, {ONE: {"a": torch.ones(2), "c": torch.ones(1)}, TWO: {"a": torch.zeros(2)}}))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:4],
        lambda content: b"",
        lambda content: b"\xff" * 8 + content[8:],
        lambda content: (1 << 40).to_bytes(8, "little") + content[8:],
        lambda content: content[:8] + b"[" + content[9:],
        lambda content: content.replace(b"[0,8]", b"[0,9]"),
        lambda content: content.replace(b"[2]", b"[3]"),
        lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    ],
)
def test_damaged_files_are_named(damage: Any, tmp_path: Path) -> None:
    """An interrupted download, or a pointer that git left in the place of the file, must not crash the reader."""
    path = shards(tmp_path, {"model.safetensors": {"a": torch.ones(2)}}, False) / "model.safetensors"
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    with pytest.raises(FilesError, match=r"model\.safetensors is not a whole safetensors file"):
        Source(tmp_path)


def test_missing_and_unfit_tensors_are_named(tmp_path: Path) -> None:
    """The message is all a user has to tell a wrong config from a wrong file."""
    source = Source(shards(tmp_path, {"model.safetensors": {"a": torch.ones(2, 3)}}, False))
    with pytest.raises(TensorError, match="no tensor 'b'"):
        source.tensor("b")
    with pytest.raises(TensorError, match=r"'a' has shape \[2, 3\], expected \[3, 2\]"):
        source.take("a", (3, 2))
    with pytest.raises(TensorError, match="'a' has dtype float32, expected float16"):
        source.take("a", (2, 3), (torch.float16,))
    assert source.unread() == ("a",)


def test_tensors_nobody_took_are_an_error(tmp_path: Path) -> None:
    """A layer that the model does not know of is a model that is served wrongly."""
    names = ["a", "b", "model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight"]
    source = Source(shards(tmp_path, {"model.safetensors": {name: torch.ones(2) for name in names}}, False))
    source.tensor("a")
    with pytest.raises(TensorError, match=r"does not use: b \[2\], lm_head\.weight \[2\]\."):
        source.check_all_read()
    source.tensor("b")
    source.check_all_read(ignore=["lm_head.weight"])


def test_every_error_is_a_checkpoint_error() -> None:
    """The server catches one type and shows its message."""
    assert issubclass(FilesError, CheckpointError)
    assert issubclass(CheckpointError, ValueError)
