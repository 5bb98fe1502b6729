"""Dockerfile and docker-compose.yml against the real command line, routes and packages."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi import FastAPI
from fastapi.routing import APIRoute

from server.app import create_app, create_ops_app
from server.config import ServerConfig, load
from tests.fakes import ByteTokenizer, FakeEngine

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return (ROOT / "Dockerfile").read_text().replace("\\\n", " ")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return loaded


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = compose["services"]
    return found


@pytest.fixture(scope="module", params=["server", "server-gpu"])
def service(request: pytest.FixtureRequest, services: dict[str, Any]) -> dict[str, Any]:
    server: dict[str, Any] = services[request.param]
    return server


def paths(app: FastAPI) -> set[str]:
    return {route.path for route in app.routes if isinstance(route, APIRoute)}


def routes(ops_port: int | None = None) -> set[str]:
    return paths(create_app(FakeEngine(), ByteTokenizer(), ServerConfig(ops_port=ops_port), "demo"))


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
    assert set(asked) <= routes(int(service["environment"]["NIBBLE_OPS_PORT"]))


def test_what_the_image_copies_exists_and_is_not_ignored(dockerfile: str) -> None:
    """Bug: a package left out of the image, or shut out by .dockerignore."""
    copied = {word for line in re.findall(r"^COPY (?!--from)(.*)$", dockerfile, re.M) for word in line.split()[:-1]}
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)
    assert {"server", "engine", "kvcache", "kernels", "demo"} <= copied


def test_images_have_extras_and_stages_that_exist(dockerfile: str, services: dict[str, Any]) -> None:
    """Bug: an image without what the service switches on, or the image of another service."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    stages = re.findall(r"^FROM .* AS (\w+)$", dockerfile, re.M)
    gpu = services["server-gpu"]["build"]
    assert services["server"]["build"] == gpu["context"] == "."
    assert services["server"]["image"] != services["server-gpu"]["image"]
    assert gpu["target"] in stages
    assert "ARG EXTRAS=tracing" in dockerfile  # for NIBBLE_OTLP_ENDPOINT
    assert set(gpu["args"]) == {"EXTRAS"}
    assert {"tracing", "gpu"} == set(gpu["args"]["EXTRAS"].split(",")) <= set(extras)
    assert dockerfile.rstrip().endswith("FROM cpu")  # what `docker build .` makes


def test_triton_can_compile_and_keep_what_it_compiled(dockerfile: str, services: dict[str, Any]) -> None:
    """Bug: no compiler, a home folder that is read-only, or a /tmp that runs no programs: the first kernel fails."""
    stage = dockerfile.split(" AS gpu\n")[1].split("\nFROM ", maxsplit=1)[0]
    assert re.search(r"apt-get install .*\bgcc\b", stage)
    folder = re.findall(r"TRITON_CACHE_DIR=(\S+)", stage)
    assert [Path(path).parent for path in folder] == [Path(services["server-gpu"]["volumes"][0].split(":")[1])]
    assert stage.split("USER ")[-1].strip() == "nibble"


def test_the_container_is_not_root_and_keeps_nothing_but_models(dockerfile: str, service: dict[str, Any]) -> None:
    assert re.search(r"useradd .*--uid 10001", dockerfile)
    assert service["user"] == "10001"
    assert service["read_only"] is True
    assert service["environment"]["HF_HOME"] == "/models"
    assert service["volumes"] == ["models:/models"]


def test_grace_outlasts_the_drain(service: dict[str, Any]) -> None:
    """Bug: a container killed while its streams still drain."""
    assert int(service["stop_grace_period"].removesuffix("s")) > ServerConfig().drain_seconds


def test_the_settings_of_the_environment_are_read(
    service: dict[str, Any], monkeypatch: pytest.MonkeyPatch, services: dict[str, Any]
) -> None:
    """Bug: a value in the compose file that the server refuses, so that the container starts and dies for ever."""
    for name, value in service["environment"].items():
        monkeypatch.setenv(name, re.sub(r"\$\{\w+:-(.*)\}", r"\1", value))
    settings = load({})
    assert (settings.host, settings.port, settings.ops_port) == ("0.0.0.0", 8000, 8001)
    assert (settings.model, settings.api_key) == (None, None)
    assert settings.device == ("cpu" if service is services["server"] else "cuda")


def test_variables_for_the_compose_file_are_no_settings(
    compose: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a name that the compose file reads and that stops a server on the same machine as an unknown setting."""
    for name in re.findall(r"\$\{(\w+)", yaml.safe_dump(compose)):
        if f"{name}".removeprefix("NIBBLE_").lower() not in ServerConfig.model_fields:
            monkeypatch.setenv(name, "1")
    load({})


def test_prometheus_asks_where_the_metrics_are(services: dict[str, Any]) -> None:
    """Bug: a scrape of a port or a host that there is not: every panel empty, and NibbleDown for ever."""
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    ((target,),) = [entry["targets"] for entry in job["static_configs"]]
    host, port = target.split(":")
    for name in ("server", "server-gpu"):
        aliases = services[name].get("networks", {}).get("default", {}).get("aliases", [])
        assert host in (name, *aliases)
        assert services[name]["environment"]["NIBBLE_OPS_PORT"] == port
    app = create_app(FakeEngine(), ByteTokenizer(), ServerConfig(ops_port=int(port)))
    assert "/metrics" in paths(create_ops_app(app.state.service))
    assert "metrics_path" not in job
    assert all((ROOT / "deploy/prometheus" / name).is_file() for name in config["rule_files"])


def test_grafana_finds_its_files_and_prometheus(services: dict[str, Any]) -> None:
    """Bug: a dashboard that is mounted where the provider does not look, or a data source that is another service."""
    grafana, prometheus = services["grafana"], services["prometheus"]
    mounts = dict(mount.split(":")[:2] for mount in grafana["volumes"])
    provisioning = ROOT / "deploy/grafana/provisioning"
    assert mounts["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"  # where Grafana looks
    (provider,) = yaml.safe_load((provisioning / "dashboards/nibble.yml").read_text())["providers"]
    assert provider["options"]["path"] == mounts["./deploy/grafana/dashboards"]
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (ROOT / "deploy/grafana/dashboards" / home.relative_to(provider["options"]["path"])).is_file()
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    assert source["url"] == f"http://prometheus:{prometheus['expose'][0]}"
    scrapes = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scrapes


def test_every_service_is_confined(services: dict[str, Any]) -> None:
    """Bug: a service added later that runs as root, writes its image, or takes all memory."""
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["user"] not in ("", "0", "root"), name
        assert service["cap_drop"] == ["ALL"], name
        assert service["restart"] == "unless-stopped", name
        assert service["healthcheck"]["test"], name
        assert {"memory", "cpus"} <= service["deploy"]["resources"]["limits"].keys(), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        assert set(service["profiles"]) <= {"cpu", "gpu"}, name


def test_volumes_and_mounted_folders_exist(compose: dict[str, Any], services: dict[str, Any]) -> None:
    for service in services.values():
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            assert (ROOT / source).is_dir() if source.startswith(".") else source in compose["volumes"]


def test_the_compose_file_holds_no_secret(services: dict[str, Any]) -> None:
    """Bug: a password that somebody put in to try something."""
    for service in services.values():
        for name, value in service.get("environment", {}).items():
            if re.search(r"KEY|PASSWORD|SECRET|TOKEN", name):
                assert re.fullmatch(r"\$\{\w+:-\}", value), name


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is not installed")
@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_docker_compose_takes_the_file(profile: str) -> None:
    words = ["docker-compose", "--profile", profile, "config", "--services"]
    done = subprocess.run(words, check=False, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
