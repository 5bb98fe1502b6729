"""nibble convert on the command line; what it does is in tests/engine/conversion."""

import json
import re
from pathlib import Path

import pytest

from engine.messages import Conversion, ConversionSettings, ConvertedLayer
from server import cli
from tests.server.test_cli import invoke, run

CONVERSION = Conversion(
    source="old",
    destination="a folder/new",
    made_by="rtn:b4:g64",
    layers=[
        ConvertedLayer("model.layers.0.mlp.up_proj", "4-bit g64", 1024, 544, 0.1125),
        ConvertedLayer("x", "kept", 8, 16, 0),
    ],
    source_bytes=1 << 20,
    num_bytes=1 << 18,
    num_shards=3,
    num_resumed=1,
)


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[ConversionSettings]:
    """`nibble convert` without an engine; the settings it was called with."""
    asked: list[ConversionSettings] = []

    def convert(folder: Path, destination: Path, settings: ConversionSettings, on_progress: object) -> Conversion:
        asked.append(settings)
        if destination.exists():
            raise ValueError(f"{destination} exists already")
        return CONVERSION

    monkeypatch.setattr(cli, "convert_model", convert)
    monkeypatch.setattr(cli, "conversion_forecast", lambda folder, settings: ("g100 is slow",))
    return asked


def test_convert_says_what_became_of_every_layer(converted: list[ConversionSettings], tmp_path: Path) -> None:
    """Bug: a table that leaves out what was lost, a command to paste that breaks on a space."""
    code, text = run("convert", str(tmp_path), "new", "--scheme", "rtn:b4:g64", "--keep", ".*down", "--keep", ".*up")
    assert (code, converted) == (0, [ConversionSettings("rtn:b4:g64", (".*down", ".*up"))])
    assert "note: g100 is slow\n" in text
    assert re.search(r"mlp.up_proj +4-bit g64 +4.25 +11.25%", text)
    assert re.search(r"x +kept +16.00 +none", text)
    assert "1 of 3 shards from an earlier run" in text
    assert "nibble serve 'a folder/new'" in text


def test_convert_in_json(converted: list[ConversionSettings], tmp_path: Path) -> None:
    result = invoke("convert", str(tmp_path), "new", "--recover", "--json")
    assert (result.exit_code, converted) == (0, [ConversionSettings(None)])
    assert json.loads(result.stdout)["layers"][0]["error"] == 0.1125


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "either --recover or --scheme"),
        (["--recover", "--scheme", "rtn"], "either --recover or --scheme"),
        (["--recover"], "exists already"),
    ],
)
def test_convert_refuses_with_a_sentence(
    converted: list[ConversionSettings], tmp_path: Path, options: list[str], sentence: str
) -> None:
    code, text = run("convert", str(tmp_path), str(tmp_path), *options)
    assert code == 2
    assert sentence in text
    assert "Traceback" not in text


def test_a_disk_that_is_full_is_said_without_an_errno(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: "[Errno 28]", and nobody knows that the work so far is kept."""

    def convert(*arguments: object) -> Conversion:
        raise OSError(28, "No space left on device", "new/a.tmp")

    monkeypatch.setattr(cli, "convert_model", convert)
    code, text = run("convert", str(tmp_path), "new", "--recover")
    assert code == 1
    assert "nibble: new/a.tmp: No space left on device. Started again, it continues from here" in text
