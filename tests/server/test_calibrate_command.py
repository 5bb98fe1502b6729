"""nibble calibrate on the command line; what it does is in tests/engine/test_calibration.py."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.messages import CalibratedLayer, CalibrationReport, CalibrationSettings, Loading
from server import cli
from tests.server.test_cli import run

REPORT = CalibrationReport(
    artifact="out dir/cal",
    policy="skvq:k2v2:w128:s4",
    digest="abc",
    provenance="8 x 2,048 tokens of text",
    num_tokens=16384,
    seconds=3.0,
    layers=[CalibratedLayer("k2v2", "scaled hadamard", "sorted", 0.75, 0.875, 0.25, 0.0625)],
    wider="skvq:k2v2:w128:s4/0=skvq:k4v2",
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[CalibrationSettings]:
    settings: list[CalibrationSettings] = []

    def calibrate(given: CalibrationSettings, on_progress: Callable[[Loading], None]) -> CalibrationReport:
        if given.data == "missing":
            raise ValueError("the text missing cannot be read: No such file or directory")
        settings.append(given)
        on_progress(Loading(1, 2))
        return REPORT

    monkeypatch.setattr(cli, "calibrate_model", calibrate)
    return settings


def test_the_table_and_how_to_serve_it(tmp_path: Path, asked: list[CalibrationSettings]) -> None:
    """Bug: a command shown that does not run, because a path has a space."""
    code, text = run("calibrate", str(tmp_path), "--data", "text", "--policy", "skvq:k2v2", "--tokens", "100")
    assert code == 0
    assert asked == [CalibrationSettings(str(tmp_path), "text", "skvq:k2v2", None, 100)]
    assert "0 k2v2" in text
    assert "scaled hadamard" in text
    assert "0.25000" in text
    assert "0.06250" in text
    assert "--policy skvq:k2v2:w128:s4/0=skvq:k4v2" in text
    assert "--kv skvq:k2v2:w128:s4 --kv-calibration 'out dir/cal'" in text


def test_json_is_the_whole_report(tmp_path: Path, asked: list[CalibrationSettings]) -> None:
    code, text = run("calibrate", str(tmp_path), "--data", "t", "--policy", "p", "--out", "cal", "--json")
    assert code == 0
    assert json.loads(text)["layers"][0]["error_after"] == 0.0625
    assert asked[0].out == "cal"


@pytest.mark.usefixtures("asked")
def test_what_is_wrong_is_one_sentence(tmp_path: Path) -> None:
    code, text = run("calibrate", str(tmp_path), "--data", "missing", "--policy", "p")
    assert code == 2
    assert "the text missing cannot be read" in text
