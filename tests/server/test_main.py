"""The console script."""

import builtins
import subprocess
import sys
from typing import Any

import pytest

from server import main


def test_ctrl_c_while_the_server_is_imported_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: pages of import statements for a Ctrl-C in the first second."""
    real = builtins.__import__

    def interrupted(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "server.cli":
            raise KeyboardInterrupt
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", interrupted)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == main.INTERRUPTED


@pytest.mark.parametrize(
    ("module", "later"),
    [
        ("server.main", {"typer", "server.cli"}),
        ("server.cli", {"fastapi", "uvicorn", "jinja2", "transformers", "huggingface_hub"}),
        ("engine.checkpoint.hub", {"huggingface_hub"}),
    ],
)
def test_what_takes_long_is_imported_later(module: str, later: set[str]) -> None:
    """Bugs: Ctrl-C in the first second is not understood; the engine is spawned after the imports that would have
    taken no time beside its own."""
    code = f"import sys, {module}; sys.exit(bool({later!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
