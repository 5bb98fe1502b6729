"""The speed that the start screen states."""

import pytest
import torch

from engine import assembly
from engine.assembly import StartError, measure_decode
from tests.engine.worlds import VOCAB, make_core


def test_measuring_leaves_the_engine_empty() -> None:
    core = make_core()
    assert measure_decode(core, core.parts.plan) > 0
    assert not core.has_work
    assert core.stats().pages_used == 0


def test_a_model_that_yields_nan_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a broken checkpoint that is reported as ready, with a speed."""
    monkeypatch.setattr("tests.engine.worlds.hash_logits", lambda context: torch.full((VOCAB,), torch.nan))
    core = make_core()
    with pytest.raises(StartError, match="cannot decode"):
        measure_decode(core, core.parts.plan)


def test_a_slow_model_is_not_made_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: ten steps of a model that takes seconds for each, before anyone may use it."""
    monkeypatch.setattr(assembly, "MEASURED_SECONDS", 0.0)
    core = make_core()
    assert measure_decode(core, core.parts.plan) > 0
    assert core.stats().steps_total == 1
    assert core.stats().pages_used == 0
