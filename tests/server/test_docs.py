"""docs/api.md says what the schemas say, docs/operations.md what the metrics and the command line do."""

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import typer
from prometheus_client import Metric
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from server import cli
from server.app import create_app
from server.bench.options import Asked, Output, Pace, Steps
from server.config import ServerConfig
from server.schemas.chat import ChatRequest, Message
from server.schemas.common import SamplingFields
from server.schemas.completions import CompletionRequest
from server.schemas.models import DetokenizeRequest, TokenizeRequest
from server.service import Service
from tests.fakes import ByteTokenizer, FakeEngine

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "api.md").read_text(encoding="utf-8")
OPERATIONS = (DOCS / "operations.md").read_text(encoding="utf-8")
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
    if neutral := marks.get("refused"):
        assert isinstance(neutral, list)
        status = f"refused unless {' or '.join(f'`{json.dumps(value)}`' for value in neutral)}"
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


@pytest.mark.parametrize(("title", "model", "without"), TABLES, ids=[title for title, _, _ in TABLES])
def test_field_tables_name_the_largest_values(title: str, model: type[BaseModel], without: set[str]) -> None:
    """Bug: clients learn from a 400 that n ends at 128."""
    for name, field in model.model_fields.items():
        for limit in (getattr(part, "le", None) for part in field.metadata):
            assert limit is None or re.search(rf"\b{limit:g}\b", field.description or ""), name


def test_every_route_is_in_the_documentation() -> None:
    app = create_app(FakeEngine(), ByteTokenizer(), ServerConfig())
    for path, methods in app.openapi()["paths"].items():
        for method in methods:
            assert f"`{method.upper()} {path}`" in TEXT


def metric_row(metric: Metric) -> str:
    suffix = {"counter": "_total", "info": "_info"}.get(metric.type, "")
    labels = {label: None for sample in metric.samples for label in sample.labels if label != "le"}
    shown = ", ".join(f"`{label}`" for label in labels)
    return f"| `{metric.name}{suffix}` | {metric.type} | {shown} | {metric.documentation.rstrip('.')} |"


def test_the_metrics_table_equals_the_metrics() -> None:
    """Bug: a metric that was renamed, or got a label, since it was written down."""
    section = OPERATIONS.split("# Metrics\n", 1)[1].split("\n## ", 1)[0]
    written = [line for line in section.splitlines() if line.startswith("| `")]
    service: Service = create_app(FakeEngine(), ByteTokenizer(), ServerConfig()).state.service
    rows = [metric_row(metric) for metric in service.metrics.registry.collect()]
    if not Path("/proc/self/stat").exists():  # where the client library has nothing to say of processes
        written = [line for line in written if "process_" not in line]
    assert written == rows


def test_flags_in_the_operations_guide_exist() -> None:
    """Bug: advice to use an option that was renamed."""
    settings = {"--" + name.replace("_", "-") for name in ServerConfig.model_fields}
    options = {
        "--" + ("json" if field.name == "as_json" else field.name.replace("_", "-"))
        for part in (Asked, Pace, Steps, Output)
        for field in fields(part)
    }
    of_other_programs = {"--help", "--config", "--profile", "--build", "--cacert", "--minutes", "--rate", "--seconds"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", OPERATIONS))
    assert named <= settings | options | of_other_programs


def commands() -> list[str]:
    """Every call of nibble in the code of a document."""
    texts = [path.read_text(encoding="utf-8") for path in (*DOCS.glob("*.md"), DOCS.parent / "README.md")]
    return [
        found.group(1)
        for text in texts
        for found in re.finditer(r"^(?:NIBBLE_\w+=\S+ +| {4})?nibble (\w[^\n]*)$", text, re.M)
    ]


def test_commands_in_documents_can_be_given() -> None:
    """Bug: an example with an option that was renamed, or that belongs to another command."""
    assert len(commands()) >= 10
    for line in commands():
        command: object = typer.main.get_group(cli.cli)
        words = shlex.split(line, comments=True)
        while isinstance(command, typer.core.TyperGroup):
            command = command.commands[words.pop(0)]
        assert isinstance(command, typer.core.TyperCommand)
        command.make_context("nibble", [word for word in words if word != "--help"])
