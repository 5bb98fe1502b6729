"""What `make serve` hands on to nibble serve."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*words: str, **variables: str) -> tuple[int, str]:
    """The exit code and the last line of what `make` would run, called from a shell and not from another make."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    for name in ("MODEL", "PORT", "HOST", "ARGS"):
        environment.pop(name, None)
    command = ["make", "--dry-run", *words]
    done = subprocess.run(
        command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment | variables
    )
    return done.returncode, " ".join((done.stdout + done.stderr).splitlines()[-1].split())


def test_what_is_set_behind_make_reaches_the_server() -> None:
    """Bug: make serve PORT=9000 serves on port 8000."""
    assert make("serve") == (0, ".venv/bin/nibble serve")
    words = ("MODEL=a model", "PORT=9000", "HOST=0.0.0.0", "ARGS=--kv f16")
    assert make("serve", *words) == (0, ".venv/bin/nibble serve 'a model' --port 9000 --host 0.0.0.0 --kv f16")


def test_a_host_of_the_environment_is_not_the_address() -> None:
    """Bug: shells that export the machine's name as HOST open the server to the network."""
    assert make("serve", HOST="machine.example", PORT="9000") == (0, ".venv/bin/nibble serve --port 9000")


def test_what_make_does_not_know_is_refused() -> None:
    """Bug: make serve THREADS=4 starts a server of which nobody asked for 4 threads, and says nothing."""
    code, text = make("serve", "THREADS=4")
    assert code != 0
    assert "make knows no THREADS: MODEL, PORT, HOST, or ARGS=" in text
