"""docs/python.md says what the types say, and its code runs."""

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine import LLM, GenerationError, Sampling, StartError
from engine.checks import notation
from engine.config import EngineConfig
from engine.llm import Completion

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/python.md").read_text(encoding="utf-8")


def rows(title: str) -> list[str]:
    """Of the table that begins with this column."""
    table = TEXT.split(f"| {title} |", 1)[1].split("\n\n", 1)[0]
    return [line for line in table.splitlines() if line.startswith("| `")]


def beginning(field: msgspec.structs.FieldInfo) -> str:
    types = " or ".join(f"`{part}`" for part in notation(field.type).split(" | "))
    value = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
    default = "required" if field.required else f"`{value!r}`"
    return f"| `{field.name}` | {types} | {default} | "


@pytest.mark.parametrize(("title", "struct"), [("setting", EngineConfig), ("field of `Sampling`", Sampling)])
def test_tables_equal_the_types(title: str, struct: type[msgspec.Struct]) -> None:
    """Bug: a setting that was added, renamed, or got another default or range since it was written down."""
    fields = [field for field in msgspec.structs.fields(struct) if field.name != "model"]
    for line, field in zip(rows(title), fields, strict=True):
        assert line.startswith(beginning(field))
        assert len(line) > len(beginning(field)) + 5, "it says nothing"


def test_every_public_name_and_method_is_described() -> None:
    for name in (*vars(Completion()), "StartError", "GenerationError"):
        assert f"`{name}`" in TEXT
    for method in (name for name in vars(LLM) if not name.startswith("_")):
        assert f"`llm.{method}(" in TEXT
        assert getattr(LLM, method).__doc__
    assert StartError.__doc__
    assert GenerationError.__doc__


def test_the_code_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: an example that was right when it was written."""
    monkeypatch.chdir(ROOT)
    namespace: dict[str, Any] = {}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(from engine .*?)```", readme, re.DOTALL)
    assert blocks
    for block in [*blocks, *re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)]:
        capsys.readouterr()
        exec(block, namespace)
        assert capsys.readouterr().out or "print" not in block
