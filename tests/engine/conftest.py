"""A checkpoint small enough to load in a moment."""

from pathlib import Path

import pytest

from tests.e2e.process import write_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))
