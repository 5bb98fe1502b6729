"""A real Prometheus watches a real server under load:  python -m benchmarks.monitoring [--seconds 60] [--rate 4]

Starts `nibble serve` with the demo model and Prometheus with the configuration and the rules of deploy/, sends requests
with `nibble bench serve`, and then asks Prometheus for every expression of every dashboard panel, recording rule and
alert. Prints what each returns; one that returns nothing is an error. Needs prometheus and promtool on the PATH.
"""

import argparse
import json
import math
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

ROOT = Path(__file__).parent.parent
PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARDS = ROOT / "deploy" / "grafana" / "dashboards"
VARIABLES = {"$__rate_interval": "30s", "$instance": ".*"}
INTERVAL = "2s"  # of scrapes and rules, so that a minute is enough
START_LIMIT_S = 300.0
NAME = re.compile(r"\b(?:nibble|process)_[a-z0-9_]+\b")
RECORDED = re.compile(r"\bnibble:[a-z0-9_:]+")
COMPARISON = re.compile(r"(?<![!=<>~])(==|!=|<=|>=|<|>)(?![=~])(?!\s*bool\b)\s*")
STRING = re.compile(r'"[^"]*"')


@dataclass(frozen=True)
class Expression:
    """PromQL and where it stands."""

    place: str
    promql: str

    @property
    def metrics(self) -> set[str]:
        """Names of the server's own series that it reads."""
        return set(NAME.findall(STRING.sub('""', self.promql)))

    @property
    def recorded(self) -> set[str]:
        """Names of recording rules that it reads."""
        return set(RECORDED.findall(self.promql))

    @property
    def query(self) -> str:
        """The expression with Grafana's variables filled in, and 0 or 1 where a comparison would leave things out."""
        text = self.promql
        for name, value in VARIABLES.items():
            text = text.replace(name, value)
        hidden = re.sub(r"\{[^}]*\}", lambda selector: selector[0].replace("=", "\0"), text)
        return COMPARISON.sub(r"\1 bool ", hidden).replace("\0", "=")


def of_dashboards(folder: Path = DASHBOARDS) -> list[Expression]:
    """Every expression of every panel and variable. A file that holds no dashboard raises KeyError."""
    found = []
    for path in sorted(folder.glob("*.json")):
        dashboard = json.loads(path.read_text(encoding="utf-8"))
        for panel in dashboard["panels"]:
            found += [Expression(f"panel {panel['title']}", target["expr"]) for target in panel.get("targets", ())]
        for variable in dashboard["templating"]["list"]:
            if match := re.fullmatch(r"label_values\((.*), \w+\)", variable.get("definition", "")):
                found.append(Expression(f"variable {variable['name']}", match[1]))
    return found


def of_rules(path: Path = PROMETHEUS / "rules.yml") -> list[Expression]:
    """The expressions of recording rules and alerts, and the names that are recorded."""
    found = []
    for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]:
        for rule in group["rules"]:
            if "record" in rule:
                found.append(Expression(f"record of {rule['record']}", rule["record"]))
            found.append(Expression(f"rule {rule.get('record') or rule['alert']}", rule["expr"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="of load")
    parser.add_argument("--rate", type=float, default=4, help="requests a second")
    parser.add_argument("--report", type=Path, help="picture or page of the load test")
    args = parser.parse_args()
    for tool in ("prometheus", "promtool"):
        if shutil.which(tool) is None:
            sys.exit(f"{tool} is not installed: apt-get install prometheus, or see https://prometheus.io/download/")
    with tempfile.TemporaryDirectory() as folder:
        ports = free_port(), free_port(), free_port()
        config = write_config(Path(folder), ports[1])
        subprocess.run(["promtool", "check", "config", str(config)], check=True)
        url, prometheus = f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[2]}"
        listen = ["--storage.tsdb.path", f"{folder}/data", "--web.listen-address", f"127.0.0.1:{ports[2]}"]
        serve = [sys.executable, "-m", "server.cli", "serve", "--port", str(ports[0]), "--ops-port", str(ports[1])]
        with (
            running(serve, f"{url}/ready", Path(folder) / "server.log"),
            running(
                ["prometheus", "--config.file", str(config), *listen],
                f"{prometheus}/-/ready",
                Path(folder) / "prometheus.log",
            ),
        ):
            with subprocess.Popen(load(url, ports[1], args), cwd=ROOT) as sending:
                time.sleep(args.seconds)  # requests still run: gauges are not back at 0
                num_missing = check(prometheus)
            num_missing += sending.returncode != 0
    sys.exit(f"{num_missing} expressions return nothing, or requests failed" if num_missing else 0)


def write_config(folder: Path, port: int) -> Path:
    """The configuration of deploy/, for a server on this machine and without patience."""
    config: dict[str, Any] = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": INTERVAL, "evaluation_interval": INTERVAL}
    config["rule_files"] = [str(PROMETHEUS / name) for name in config["rule_files"]]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@contextmanager
def running(command: list[str], ready_url: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process, from the moment it answers. Ends the program, with its log, when it does not."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while not answers(ready_url):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{command[0]} did not start:\n{log.read_text(errors='replace')}")
            time.sleep(0.2)
        yield process
    finally:
        process.terminate()
        process.wait(60)


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def load(url: str, ops_port: int, args: argparse.Namespace) -> list[str]:
    """The command that sends requests which share beginnings, for a little more than `--seconds`."""
    command = [sys.executable, "-m", "server.cli", "bench", "serve", url, "--dataset", "shared-prefix"]
    command += ["--metrics-url", f"http://127.0.0.1:{ops_port}/metrics", "--spread", "0.5"]
    command += ["--rate", str(args.rate), "--requests", str(max(1, round((args.seconds + 2) * args.rate)))]
    command += ["--input-len", "64", "--prefix-len", "128", "--output-len", "48", "--slo", "ttft=2.5s,tpot=100ms"]
    return command + ([] if args.report is None else ["--report", str(args.report)])


def check(prometheus: str) -> int:
    """Ask for every expression; returns how many had nothing to say."""
    num_missing = 0
    for expression in [*of_dashboards(), *of_rules()]:
        response = httpx.get(f"{prometheus}/api/v1/query", params={"query": expression.query})
        if response.status_code != 200:
            sys.exit(f"{expression.place}: {response.text}\n{expression.query}")
        values = [float(series["value"][1]) for series in response.json()["data"]["result"]]
        found = [value for value in values if not math.isnan(value)]
        num_missing += not found
        shown = ", ".join(f"{value:.4g}" for value in found[:4]) + (", ..." if len(found) > 4 else "")
        print(f"{'ok  ' if found else 'NONE'}  {expression.place}: {len(values)} series: {shown}")
    return num_missing


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
