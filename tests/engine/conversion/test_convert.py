"""nibble convert as a whole: what is written, what is never overwritten, and what an interruption costs."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from engine.checkpoint.source import Source
from engine.conversion import convert as module
from engine.conversion.convert import convert
from engine.conversion.encoder import ConversionRefused
from engine.conversion.forecast import slow_kernels
from engine.conversion.layers import linear_layers
from engine.conversion.workplace import Workplace
from engine.loading import open_checkpoint
from engine.messages import ConversionSettings, Loading
from kernels import native
from tests.engine.models.oracle import write_checkpoint

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
NO_FAST_KERNEL = "4-bit g24: only the slow reference kernel would serve it on CPUs (groups of 24 channels are"
RTN = ConversionSettings("rtn:b4:g32")
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny Llama in three shards, with files beside it."""
    folder = tmp_path / "source"
    write_checkpoint(folder, LlamaConfig(**SIZES))
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for i in range(3):
        file = f"part-{i}.safetensors"
        part = {name: tensors[name].half() for name in names[i::3]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"never copied")
    return folder


@pytest.mark.skipif(native.MISSING is not None, reason="without the C++ library nothing is fast")
def test_a_scheme_that_no_fast_kernel_serves_is_foretold(source: Path) -> None:
    """Bug: minutes of conversion into a checkpoint that answers by the minute, without a word before."""
    assert slow_kernels(source, RTN) == ()
    (line,) = slow_kernels(source, ConversionSettings("rtn:b4:g24"))
    assert line.startswith(NO_FAST_KERNEL)


def test_every_linear_layer_is_converted_and_the_rest_is_copied(source: Path, tmp_path: Path) -> None:
    """Bug: a tensor left out, a norm quantized, the old index or pickles copied beside the new files."""
    heard: list[Loading] = []
    conversion = convert(source, tmp_path / "new", RTN, heard.append)
    assert {layer.name for layer in conversion.layers} == set(linear_layers(source))
    assert len(conversion.layers) == 14
    assert all(layer.what == "4-bit g32" and layer.bits == 4.5 and 0 < layer.error < 0.2 for layer in conversion.layers)
    assert conversion.num_bytes < 0.5 * conversion.source_bytes
    assert (heard[-1].done_bytes, heard[-1].total_bytes) == (conversion.source_bytes, conversion.source_bytes)
    names = {path.name for path in (tmp_path / "new").iterdir()}
    shards = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    others = {path.name for path in source.iterdir() if "part-" not in path.name and path.suffix != ".bin"}
    assert names == shards | others
    assert not list(tmp_path.glob(".*"))
    old, new = Source(source), Source(tmp_path / "new")
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(new.tensor(name), old.tensor(name))
    checkpoint = open_checkpoint(tmp_path / "new")
    assert checkpoint.format.describe() == "Nibble container, rtn:b4:g32"
    weights = checkpoint.format.linear(checkpoint.source, QUERY, (64, 64), False)
    error = (weights.dequantize() - old.tensor(f"{QUERY}.weight").float()).norm()
    assert 0 < float(error) < 0.2 * float(old.tensor(f"{QUERY}.weight").float().norm())


def test_one_file_stays_one_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", LlamaConfig(**SIZES))
    convert(tmp_path / "source", tmp_path / "new", RTN)
    assert {path.name for path in (tmp_path / "new").glob("model*")} == {"model.safetensors"}


def test_layers_may_be_kept(source: Path, tmp_path: Path) -> None:
    """Bug: a pattern that matches part of a name; one that matches nothing, silently."""
    conversion = convert(source, tmp_path / "new", ConversionSettings("rtn", (r".*\.0\.self_attn\..*", ".*down_proj")))
    kept = {layer.name for layer in conversion.layers if layer.what == "kept"}
    assert len(kept) == 6
    assert {layer.bits for layer in conversion.layers if layer.name in kept} == {16.0}
    for keep, message in (
        ("q_proj", "matches no linear layer; the first is 'model"),
        ("(", "not a regular expression"),
    ):
        with pytest.raises(ConversionRefused, match=message):
            convert(source, tmp_path / "other", ConversionSettings("rtn", (keep,)))


def test_recovery_refuses_with_the_layers_name_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    """Bug: random weights stored as tables of 16; a half-written folder that is in the way of the next try."""
    with pytest.raises(ConversionRefused, match=r"layer 'model\.layers\..*_proj' cannot be converted: .*--keep"):
        convert(source, tmp_path / "new", ConversionSettings(None))
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_recovery_is_exact(source: Path, tmp_path: Path) -> None:
    """A conversion, saved as floats as papers do, and recovered: the same weights in as many bits."""
    convert(source, tmp_path / "rounded", ConversionSettings("rtn:b3:g32:asym"))
    checkpoint = open_checkpoint(tmp_path / "rounded")
    for file in source.glob("part-*.safetensors"):
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        for name, shape in linear_layers(source).items():
            if f"{name}.weight" in tensors:
                weights = checkpoint.format.linear(checkpoint.source, name, shape, False)
                tensors[f"{name}.weight"] = weights.dequantize().half()
        save_file(tensors, file)
    conversion = convert(source, tmp_path / "recovered", ConversionSettings(None))
    assert all(layer.what == "3-bit g32" and layer.error == 0 for layer in conversion.layers)
    recovered = open_checkpoint(tmp_path / "recovered")
    for name, shape in linear_layers(source).items():
        weights = recovered.format.linear(recovered.source, name, shape, False)
        assert torch.equal(weights.dequantize().half(), Source(source).tensor(f"{name}.weight"))


@pytest.mark.parametrize("damage", [torch.nan, torch.inf])
def test_damaged_weights_are_named(source: Path, tmp_path: Path, damage: float) -> None:
    for file in source.glob("part-*.safetensors"):
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        if f"{QUERY}.weight" in tensors:
            tensors[f"{QUERY}.weight"][3, 5] = damage
            save_file(tensors, file)
    with pytest.raises(ConversionRefused, match=f"layer '{QUERY}' holds a weight that is not finite"):
        convert(source, tmp_path / "new", RTN)


def test_what_is_quantized_already_is_not_converted_again(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "new", RTN)
    with pytest.raises(ConversionRefused, match=r"quantized already \(Nibble container, rtn:b4:g32\)"):
        convert(tmp_path / "new", tmp_path / "newer", RTN)


def test_a_gguf_file_is_served_and_not_converted(tmp_path: Path) -> None:
    """Bug: "model.gguf/config.json cannot be read: Not a directory", and nobody knows what to give instead."""
    sentence = "is served as it is .nibble serve .*model.gguf.* give a folder with the model's safetensors"
    with pytest.raises(ConversionRefused, match=sentence):
        convert(tmp_path / "model.gguf", tmp_path / "new", RTN)


def test_nothing_foreign_is_overwritten(source: Path, tmp_path: Path) -> None:
    """Bug: a typing error in DST that costs a model."""
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConversionRefused, match="mine exists already"):
        convert(source, tmp_path / "mine", RTN)
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial/letter.txt").write_text("keep me")
    with pytest.raises(ConversionRefused, match=r"\.new\.partial is in the way"):
        convert(source, tmp_path / "new", RTN)
    assert (tmp_path / ".new.partial/letter.txt").read_text() == "keep me"


@pytest.mark.parametrize("parent", ["a file", "a file/below"])
def test_a_place_where_no_folder_can_be_made_is_named(source: Path, tmp_path: Path, parent: str) -> None:
    """Bug: a bare errno that names a hidden folder the caller has never heard of."""
    (tmp_path / "a file").touch()
    with pytest.raises(ConversionRefused, match=rf"^{tmp_path / parent / 'new'} cannot be written: making .* failed: "):
        convert(source, tmp_path / parent / "new", RTN)


def test_a_full_disk_is_an_error_of_the_system(source: Path, tmp_path: Path) -> None:
    """Bug: a traceback from inside the library that writes, or the loss of the shards that are finished."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r"safetensors cannot be written: "):
            convert(source, tmp_path / "new", RTN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / ".new.partial").is_dir()
    convert(source, tmp_path / "new", RTN)


def test_two_conversions_to_one_place(source: Path, tmp_path: Path) -> None:
    with Workplace(tmp_path / "new", "job", ["a"]), pytest.raises(ConversionRefused, match="another process"):
        convert(source, tmp_path / "new", RTN)


def test_an_interrupted_conversion_goes_on_where_it_stopped(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: finished shards done again, or kept although the settings are others now."""
    whole = convert(source, tmp_path / "whole", RTN)
    encode, calls = module._Job._encode, [0]

    def stop_at(number: int) -> None:
        def interrupted(job: Any, layer: str, weight: Any) -> Any:
            calls[0] += 1
            if calls[0] == number:
                raise KeyboardInterrupt
            return encode(job, layer, weight)

        calls[0] = 0
        monkeypatch.setattr(module._Job, "_encode", interrupted)

    stop_at(7)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "new", RTN)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConversionRefused, match="with other settings"):
        convert(source, tmp_path / "new", ConversionSettings("rtn:b3:g32"))
    stop_at(1000)
    conversion = convert(source, tmp_path / "new", RTN)
    assert conversion.num_resumed == 1
    assert 0 < calls[0] < 14
    assert conversion.layers == whole.layers
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "new" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_killed_conversion_goes_on_where_it_stopped(source: Path, tmp_path: Path) -> None:
    """Bug: a record of a shard that was not wholly written when the process died."""
    script = (
        "import sys, time; from pathlib import Path\n"
        "from engine.conversion import workplace\n"
        "from engine.conversion.convert import convert\n"
        "from engine.messages import ConversionSettings\n"
        "save = workplace.save_file\n"
        "def slow(tensors, path, **more):\n"
        "    save(tensors, path, **more); time.sleep(0 if '00001' in str(path) else 60)\n"
        "workplace.save_file = slow\n"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]), ConversionSettings('rtn:b4:g32'))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(source), str(tmp_path / "new")])
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(".new.partial/model-00002*.tmp")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(30)
    assert not (tmp_path / "new").exists()
    conversion = convert(source, tmp_path / "new", RTN)
    assert conversion.num_resumed == 1
    convert(source, tmp_path / "whole", RTN)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "new" / path.name).read_bytes() == path.read_bytes(), path.name
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }


def test_one_shard_is_held_at_a_time(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a list of all results, written at the end: a 70B model in memory."""
    add, sizes = Workplace.add, []

    def counted(place: Workplace, file: str, tensors: dict[str, torch.Tensor], shard: Any) -> None:
        sizes.append(sum(1 for value in alive if value() is not None))
        alive.extend(weakref.ref(tensor) for tensor in tensors.values())
        add(place, file, tensors, shard)

    alive: list[weakref.ref[torch.Tensor]] = []
    monkeypatch.setattr(Workplace, "add", counted)
    convert(source, tmp_path / "new", RTN)
    assert len(alive) > 30
    assert sizes == [0, 0, 0]
