"""The command line: help, and mistakes that end with a sentence."""

import json
import re
import socket
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from engine.config import EngineConfig
from engine.messages import CacheMemory, Inspection, Loading
from server import cli, lifecycle, ports, screen, serving
from server.config import ServerConfig, flag_name
from server.lifecycle import DrainingServer
from tests.fakes import PLAN, ByteTokenizer, FakeEngine


def run(*arguments: str) -> tuple[int, str]:
    """The exit code and all that was written."""
    result = invoke(*arguments)
    return result.exit_code, result.output


def invoke(*arguments: str, columns: int = 200) -> Result:
    result = CliRunner().invoke(cli.cli, arguments, env=dict.fromkeys(("COLUMNS", "TERMINAL_WIDTH"), str(columns)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_help_lists_every_setting_in_its_panel() -> None:
    """Bug: a setting that can be set and is not documented."""
    code, text = run("serve", "--help")
    assert code == 0
    for name in ServerConfig.model_fields:
        assert (flag_name(name) if name != "model" else "MODEL") in text
    for panel in ("Model", "Server", "Access", "Engine", "KV cache"):
        assert panel in text
    assert "--no-prefix-caching" in text
    assert "Default: 8000." in text
    assert "Default: 16.0 MiB." in text
    assert re.search(r"--no-prefix-caching.*Default: on\.", text)
    assert text.count("SIZE") == 3


@pytest.mark.parametrize("command", ["serve", "inspect", "convert", "calibrate", "bench serve", "bench sweep"])
def test_help_is_whole_in_a_narrow_terminal(command: str) -> None:
    """Bug: --kv-request-wind… in 80 columns, which nobody can type."""
    result = invoke(*command.split(), "--help", columns=80)
    assert result.exit_code == 0
    assert "…" not in result.output


def test_help_begins_with_what_most_people_want() -> None:
    """Bug: two commands that few need stand before the one that serves."""
    group = typer.main.get_group(cli.cli)
    assert list(group.commands) == ["serve", "inspect", "convert", "calibrate", "bench"]


def test_version() -> None:
    code, text = run("--version")
    assert (code, text.split()[0]) == (0, "nibble")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--port", "99999"], "--port"),
        (["--kv-memory", "lots"], "'lots' is not a size"),
        (["--config", "missing.toml"], "missing.toml"),
        (["/no/such/folder"], "/no/such/folder"),
        (["--host", "[b]", "--port", "x[/b]"], "x[/b]"),
        (["--tls-cert", "x.pem"], "--tls-cert and --tls-key belong together"),
        (["--tls-cert", "x.pem", "--tls-key", "y.pem"], "--tls-cert: x.pem is not a file"),
        (["--api-keys", "keys.toml"], "--api-keys keys.toml: No such file"),
        (["--log-prompts"], "--access-log"),
        (["--revision", "main"], "--revision main is of a model on the hub"),
        (["--port", "7", "--ops-port", "7"], "--ops-port and --port are both 7"),
        (["--otlp-endpoint", "localhost:4318"], "--otlp-endpoint must begin with http:// or https://"),
    ],
)
def test_mistakes_end_with_a_sentence_and_code_2(arguments: list[str], sentence: str) -> None:
    """Bug: a traceback for a typing error."""
    code, text = run("serve", "--port", "0", *arguments)
    assert code == 2
    assert sentence in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://localhost:80"),
        ("::", "http://localhost:80"),
        ("::1", "http://[::1]:80"),
    ],
)
def test_address_works_on_this_machine(host: str, url: str) -> None:
    assert ports.address(host, 80) == url


def test_served_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: clients must ask for "~/my-model", a path of the server, where no shell has seen the variable."""
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert cli.served_name(None) == "demo"
    assert cli.served_name(f"{folder}/") == "my-model"
    assert cli.served_name("~/my-model") == "my-model"
    assert cli.served_name("org/model") == "org/model"


@pytest.fixture
def wired(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeEngine:
    """`nibble serve` with a fake engine, ended by a signal as soon as it is ready."""
    engine = FakeEngine(state="starting")
    (tmp_path / "config.json").touch()
    monkeypatch.setattr(cli, "start_engine", lambda config, on_loading: nullcontext(engine))
    monkeypatch.setattr(serving, "load_tokenizer", lambda folder, template: ByteTokenizer())
    monkeypatch.setattr(cli, "set_up_logging", lambda level: None)
    print_start: Callable[..., None] = screen.print_start
    servers: list[DrainingServer] = []

    class Server(DrainingServer):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)  # type: ignore[arg-type]
            servers.append(self)

    def print_and_leave(*arguments: object) -> None:
        print_start(*arguments)
        servers[0].handle_exit(15, None)

    monkeypatch.setattr(lifecycle, "DrainingServer", Server)
    monkeypatch.setattr(screen, "print_start", print_and_leave)
    return engine


def test_serve_shows_the_screen_and_exits_0(wired: FakeEngine, tmp_path: Path) -> None:
    """Bug: a screen among the lines of the access log, which are standard output's."""
    result = invoke("serve", str(tmp_path), "--port", "0", "--served-name", "mine", "--access-log")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "mine: FakeForCausalLM" in result.stderr
    assert "curl -N http://127.0.0.1:" in result.stderr
    assert wired.stopped


@pytest.mark.parametrize("moment", ["load_tokenizer", "lifecycle.serve"])
def test_ctrl_c_while_loading_is_said_and_is_no_success(
    wired: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Bug: exit code 0 and not a word, as if there had been a service that was ended."""

    def pressed(*_: object) -> None:
        raise KeyboardInterrupt if moment == "load_tokenizer" else lifecycle.Interrupted(2)

    monkeypatch.setattr(f"server.serving.{moment}", pressed)
    result = invoke("serve", str(tmp_path), "--port", "0")
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == "nibble: Stopped while the model was loading: nothing was served\n"


def test_inspect_shows_progress_and_prints_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a minute of silence while a large model loads; a bar among the JSON."""
    (tmp_path / "config.json").touch()
    seen: list[Loading] = []

    def inspect(config: EngineConfig, on_loading: Callable[[Loading], None]) -> Inspection:
        on_loading(Loading(1, 4))
        return Inspection(PLAN, 1 << 20, None, None, CacheMemory(16, 1 << 20, 1024, 1024, 1024, 0, []))

    monkeypatch.setattr(cli, "inspect_model", inspect)
    monkeypatch.setattr(cli, "set_up_logging", lambda level: None)
    monkeypatch.setattr(screen.LoadingBar, "update", lambda bar, loading: seen.append(loading))
    code, text = run("inspect", str(tmp_path), "--json")
    assert code == 0
    assert json.loads(text)["kv"]["num_f16_tokens"] == 1024
    assert seen == [Loading(1, 4)]
    assert "1,024 tokens fit in 1.0 MiB" in run("inspect", str(tmp_path))[1]


def test_model_may_come_from_the_environment(
    wired: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a container image cannot name its model without a command line."""
    monkeypatch.setenv("NIBBLE_MODEL", str(tmp_path))
    code, text = run("serve", "--port", "0")
    assert code == 0
    assert f"{tmp_path.name}: FakeForCausalLM" in text


def test_taken_port_says_so_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Bug: a model is fetched and its tokenizer read, for minutes, before a port is found taken."""
    monkeypatch.setattr(cli, "model_folder", lambda settings: pytest.fail("the model was looked for"))
    monkeypatch.setattr(cli, "set_up_logging", lambda level: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, text = run("serve", str(tmp_path), "--port", port)
        ops_code, ops_text = run("serve", str(tmp_path), "--port", "0", "--ops-port", port)
    assert (code, ops_code) == (1, 1)
    in_use = f"port {port}: Address already in use. Choose another port with"
    assert f"{in_use} --port N, or with make serve PORT=N" in text
    assert f"{in_use} --ops-port N\n" in ops_text


@pytest.mark.parametrize("flag", ["--port", "--ops-port"])
def test_a_port_that_another_server_opened_first_ends_the_start(
    wired: FakeEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flag: str
) -> None:
    """Bug: a server without the metrics port that it prints, because another one bound it in the same moment."""
    opened = []

    def open_first(settings: object) -> Path:
        opened.append(socket.socket())
        opened[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened[0].bind(("127.0.0.1", number))
        opened[0].listen()
        return tmp_path

    with socket.create_server(("127.0.0.1", 0)) as free:
        number = free.getsockname()[1]
    monkeypatch.setattr(cli, "model_folder", open_first)
    others = ["--port", "0"] if flag == "--ops-port" else []
    code, text = run("serve", str(tmp_path), *others, flag, str(number))
    opened[0].close()
    assert code == 1
    assert f"port {number}: Address already in use. Choose another port with {flag} N" in text


def test_an_address_of_another_machine_is_not_blamed_on_the_port() -> None:
    code, text = run("serve", "--host", "192.0.2.1", "--port", "0")  # an address that is for documents only
    assert code == 1
    assert "Choose another address with --host" in text


def test_engine_that_cannot_load_ends_with_its_reason(
    wired: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail() -> None:
        wired.state = "failed"

    monkeypatch.setattr(wired, "start", fail)
    code, text = run("serve", str(tmp_path), "--port", "0")
    assert code == 1
    assert "the checkpoint is broken" in text


def test_folder_without_a_model_is_called_that(tmp_path: Path) -> None:
    """Bug: an empty folder is answered with advice to install tokenizer libraries."""
    code, text = run("serve", str(tmp_path), "--port", "0")
    assert code == 2
    assert "is not a model folder: it has no config.json" in text


def test_installation_without_demo_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli, "DEMO", tmp_path / "none")
    code, text = run("serve", "--port", "0")
    assert code == 2
    assert "nibble serve MODEL" in text
