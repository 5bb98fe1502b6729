"""Dockerfile and docker-compose.yml against the real command line, routes and packages."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.routing import APIRoute

from server.app import create_app
from server.config import ServerConfig
from tests.fakes import ByteTokenizer, FakeEngine

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return (ROOT / "Dockerfile").read_text().replace("\\\n", " ")


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    compose: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    server: dict[str, Any] = compose["services"]["server"]
    return server


def routes() -> set[str]:
    app = create_app(FakeEngine(), ByteTokenizer(), ServerConfig(), "demo")
    return {route.path for route in app.routes if isinstance(route, APIRoute)}


def settings_named(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith("NIBBLE_")}


def test_every_environment_name_is_a_setting(dockerfile: str, service: dict[str, Any]) -> None:
    """Bug: a variable in the compose file that the server has never heard of, and so ignores."""
    known = {f"NIBBLE_{name.upper()}" for name in ServerConfig.model_fields}
    in_dockerfile = set(re.findall(r"\b(NIBBLE_[A-Z_]+)=", dockerfile))
    assert settings_named(set(service["environment"])) | in_dockerfile <= known


def test_ports_agree(dockerfile: str, service: dict[str, Any]) -> None:
    assert "EXPOSE 8000" in dockerfile
    assert service["environment"]["NIBBLE_PORT"] == "8000"
    assert [port.rsplit(":", 1)[1] for port in service["ports"]] == ["8000"]
    assert ServerConfig().port == 8000


def test_health_checks_ask_a_real_route(dockerfile: str, service: dict[str, Any]) -> None:
    asked = re.findall(r"http://127\.0\.0\.1:8000(/\w+)", dockerfile + " ".join(service["healthcheck"]["test"]))
    assert len(asked) == 2
    assert set(asked) <= routes()


def test_what_the_image_copies_exists_and_is_not_ignored(dockerfile: str) -> None:
    """Bug: a package left out of the image, or shut out by .dockerignore."""
    copied = {word for line in re.findall(r"^COPY (?!--from)(.*)$", dockerfile, re.M) for word in line.split()[:-1]}
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)
    assert {"server", "engine", "kvcache", "kernels", "demo"} <= copied


def test_the_container_is_not_root_and_keeps_nothing_but_models(dockerfile: str, service: dict[str, Any]) -> None:
    assert re.search(r"useradd .*--uid 10001", dockerfile)
    assert service["user"] == "10001"
    assert service["read_only"] is True
    assert service["environment"]["HF_HOME"] == "/models"
    assert service["volumes"] == ["models:/models"]


def test_grace_outlasts_the_drain(service: dict[str, Any]) -> None:
    """Bug: a container killed while its streams still drain."""
    assert int(service["stop_grace_period"].removesuffix("s")) > ServerConfig().drain_seconds
