"""docs/api.md says what the schemas say."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from server.app import create_app
from server.config import ServerConfig
from server.schemas.chat import ChatRequest, Message
from server.schemas.common import SamplingFields
from server.schemas.completions import CompletionRequest
from server.schemas.models import DetokenizeRequest, TokenizeRequest
from tests.fakes import ByteTokenizer, FakeEngine

TEXT = (Path(__file__).parents[2] / "docs/api.md").read_text(encoding="utf-8")
COMMON = set(SamplingFields.model_fields)
TABLES: list[tuple[str, type[BaseModel], set[str]]] = [
    ("Fields of both", SamplingFields, set()),
    ("Fields of chat completions", ChatRequest, COMMON),
    ("Fields of a message", Message, set()),
    ("Fields of completions", CompletionRequest, COMMON),
    ("Fields of tokenize", TokenizeRequest, set()),
    ("Fields of detokenize", DetokenizeRequest, set()),
]


def row(name: str, field: FieldInfo) -> str:
    extra = field.json_schema_extra
    marks = extra if isinstance(extra, dict) else {}
    description = field.description or ""
    status = "refused" if "refused" in marks else "no effect" if "no_effect" in marks else "honoured"
    if status == "honoured" and field.is_required():
        status = "required"
    return (
        f"| `{name}` | {status} | {description.removeprefix('Not supported: ').removeprefix('Accepted, no effect: ')} |"
    )


@pytest.mark.parametrize(("title", "model", "without"), TABLES, ids=[title for title, _, _ in TABLES])
def test_field_tables_equal_the_schemas(title: str, model: type[BaseModel], without: set[str]) -> None:
    """Bug: documentation of fields that were renamed, added or dropped since."""
    section = re.split(r"^#+ ", TEXT.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    written = [line for line in section.splitlines() if line.startswith("| `")]
    assert written == [row(name, field) for name, field in model.model_fields.items() if name not in without]


def test_every_route_is_in_the_documentation() -> None:
    app = create_app(FakeEngine(), ByteTokenizer(), ServerConfig())
    for path, methods in app.openapi()["paths"].items():
        for method in methods:
            assert f"`{method.upper()} {path}`" in TEXT


def test_every_metric_is_in_the_documentation() -> None:
    for metric in create_app(FakeEngine(), ByteTokenizer(), ServerConfig()).state.service.metrics.registry.collect():
        assert f"`{metric.name}`" in TEXT or f"`{metric.name}_total`" in TEXT or f"`{metric.name}_info`" in TEXT
