"""deploy/prometheus and deploy/grafana against the metrics that the server has, and by Prometheus' own tool."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.monitoring import DASHBOARDS, PROMETHEUS, Expression, of_dashboards, of_rules
from engine.messages import Done
from server.app import create_app
from server.config import ServerConfig
from server.service import Service
from tests.fakes import ByteTokenizer, FakeEngine

ROOT = Path(__file__).parent.parent
LABELLED = re.compile(r"(\w+)\{([^}]*)\}")
MATCHER = re.compile(r'(\w+)\s*(=~|!=|!~|=)\s*"([^"]*)"')
OF_PROMETHEUS = {"instance", "job"}  # labels that a scrape adds


@pytest.fixture(scope="module")
def samples() -> dict[str, list[dict[str, str]]]:
    """Labels of every sample of the exposition, by name."""
    service: Service = create_app(FakeEngine(), ByteTokenizer(), ServerConfig()).state.service
    service.metrics.stages(Done("a", 0, "stop"))
    found: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(service.metrics.exposition().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


def expressions() -> list[Expression]:
    return [*of_dashboards(), *of_rules()]


def test_every_series_asked_for_exists(samples: dict[str, list[dict[str, str]]]) -> None:
    """Bug: a metric that was renamed, or asked for without its _total, leaves a panel empty and an alert silent."""
    wrong = [(e.place, name) for e in expressions() for name in e.metrics if name not in samples]
    assert not wrong


def test_every_label_asked_for_exists(samples: dict[str, list[dict[str, str]]]) -> None:
    """Bug: le="1" where the bucket is called 1.0, or a kind of failure that there is not: the rule never fires."""
    wrong = []
    for expression in expressions():
        for name, matchers in LABELLED.findall(expression.promql):
            for label, operator, value in MATCHER.findall(matchers):
                if label in OF_PROMETHEUS or name not in samples:
                    continue
                values = {labels[label] for labels in samples[name] if label in labels}
                wanted = set(value.split("|")) if operator == "=~" else {value}
                if not wanted <= values:
                    wrong.append((expression.place, name, label, value))
    assert not wrong


def test_alerts_read_only_what_is_recorded() -> None:
    """Bug: a recording rule that was renamed leaves the alerts built on it silent."""
    recorded = {e.promql for e in of_rules() if e.place.startswith("record of ")}
    assert set().union(*(e.recorded for e in expressions())) <= recorded


def test_every_metric_that_moves_has_a_panel(samples: dict[str, list[dict[str, str]]]) -> None:
    """Bug: a metric that nobody sees."""
    shown = {re.sub(r"_(bucket|sum|count|total)$", "", name) for e in of_dashboards() for name in e.metrics}
    ours = {re.sub(r"_(bucket|sum|count|total|created)$", "", name) for name in samples}
    constant = {name for name in ours if name.endswith(("_start_time_seconds", "_max_fds", "_virtual_memory_bytes"))}
    assert ours - constant == shown


@pytest.mark.parametrize("path", sorted(DASHBOARDS.glob("*.json")), ids=lambda path: path.name)
def test_panels_have_places_and_sources(path: Path) -> None:
    """Bug: two panels with one id, or one bound to a data source that only its author has."""
    dashboard = json.loads(path.read_text(encoding="utf-8"))
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}) == len(panels)
    for panel in panels:
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])


def test_comparisons_become_values() -> None:
    """Bug: the check of all expressions asks whether an alert fires, and not whether it has anything to look at."""
    alert = Expression("", 'a{kind=~"x|y", le!="1"} >= 3 and b == 0 or c > bool 1')
    assert alert.query == 'a{kind=~"x|y", le!="1"} >= bool 3 and b == bool 0 or c > bool 1'


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
@pytest.mark.parametrize(
    "command", ["check config prometheus.yml", "check rules rules.yml", "test rules rules_test.yml"]
)
def test_promtool_agrees(command: str) -> None:
    words = ["promtool", *command.split()]
    done = subprocess.run(words, check=False, cwd=PROMETHEUS, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_and_explained() -> None:
    """Bug: an alert that wakes somebody and does not say what to do; one that was never seen to fire."""
    tested = (PROMETHEUS / "rules_test.yml").read_text(encoding="utf-8")
    explained = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    groups = yaml.safe_load((PROMETHEUS / "rules.yml").read_text(encoding="utf-8"))["groups"]
    alerts = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    assert len(alerts) > 10
    for rule in alerts:
        assert rule["alert"] in tested
        assert f"`{rule['alert']}`" in explained
        assert {"summary", "description"} <= rule["annotations"].keys()
