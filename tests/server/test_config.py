"""Flags, file, environment, defaults: who wins, and how mistakes are named."""

from pathlib import Path

import pytest

from engine.config import EngineConfig
from kvcache.policy import read_policy
from server.config import ServerConfig, SettingsError, flag_name, load, parse_size


def test_flags_win_over_file_over_environment_over_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "nibble.toml"
    file.write_text('port = 2\nlog-level = "warning"\nkv_memory = "1GiB"\n')
    for name, value in {"PORT": "3", "LOG_LEVEL": "error", "HOST": "::1", "KV_MEMORY": "2GiB"}.items():
        monkeypatch.setenv(f"NIBBLE_{name}", value)
    settings = load({"port": "1", "host": None}, file)
    assert (settings.port, settings.log_level, settings.host) == (1, "warning", "::1")
    assert (settings.kv_memory, settings.max_num_seqs) == (1 << 30, 64)


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("4GiB", 4 << 30), ("512m", 512 << 20), ("2GB", 2 * 10**9), ("1.5k", 1536), ("77", 77)]
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({"port": "70000"}, "--port"),
        ({"kv_memory": "4 potatoes"}, "--kv-memory: '4 potatoes' is not a size"),
        ({"device": "tpu"}, "--device"),
        ({"max_model_len": "0"}, "--max-model-len"),
        ({"max_num_seqs": "many"}, "--max-num-seqs"),
    ],
)
def test_bad_values_name_the_flag(flags: dict[str, str], name: str) -> None:
    with pytest.raises(SettingsError, match=name):
        load(flags)


def test_bad_values_are_named_as_they_were_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a value of the environment or the file that is called a flag which nobody gave."""
    monkeypatch.setenv("nibble_port", "abc")
    with pytest.raises(SettingsError, match=r"^The variable nibble_port: .*found 'abc'"):
        load({})
    file = tmp_path / "nibble.toml"
    file.write_text("port = 70000\n")
    with pytest.raises(SettingsError, match=r"^--config \S+nibble\.toml: port: must be at most 65535 \(found 70000"):
        load({}, file)
    with pytest.raises(SettingsError, match=r"^--port: must be a whole number \(found 'x'"):
        load({"port": "x"}, file)
    monkeypatch.setenv("NIBBLE_OTLP_ENDPOINT", "localhost:4318")
    with pytest.raises(SettingsError, match=r"^The variable NIBBLE_OTLP_ENDPOINT must begin with http://"):
        load({"port": "1"})
    monkeypatch.setenv("NIBBLE_OTLP_ENDPOINT", "")  # as if it were not set
    with pytest.raises(SettingsError, match=r"^--otlp-endpoint must"):
        load({"port": "1", "otlp_endpoint": "localhost:4318"})


@pytest.mark.parametrize("origins", ["*", "https://a.example", "http://localhost:3000, http://[::1]:3000,app://x"])
def test_origins_that_browsers_send(origins: str) -> None:
    assert load({"cors_origins": origins}).cors_origins == origins


@pytest.mark.parametrize(
    "origins",
    [
        *("foo", "localhost:3000", "https://", "https://a.example/", "https://A.example", "https://a.example:443"),
        *("https://a.example,", "*,https://a.example", "https://a.example https://b.example", "null", ""),
    ],
)
def test_origins_that_no_browser_sends_are_errors(origins: str) -> None:
    """Bug: an origin that never matches, so that pages are shut out and nothing says why; one that opens to all."""
    with pytest.raises(SettingsError, match=r"^--cors-origins: '.*' is not an origin; write scheme://host"):
        load({"cors_origins": origins})


def test_unknown_keys_of_the_file_are_errors(tmp_path: Path) -> None:
    """Bug: a misspelt key is ignored and the server runs with a default nobody chose."""
    file = tmp_path / "nibble.toml"
    file.write_text("max-sequences = 3\n")
    with pytest.raises(SettingsError, match="'max-sequences' is not a setting"):
        load({}, file)
    file.write_text("port = = 3\n")
    with pytest.raises(SettingsError, match=r"nibble\.toml"):
        load({}, file)
    with pytest.raises(SettingsError, match=r"none\.toml"):
        load({}, tmp_path / "none.toml")


def test_engine_defaults_are_the_engines_own(tmp_path: Path) -> None:
    """Bug: the server and the engine drift apart on a default."""
    assert ServerConfig().engine(tmp_path) == EngineConfig(model=str(tmp_path))


def test_engine_gets_every_wish(tmp_path: Path) -> None:
    """Bug: a flag that is read and never handed on."""
    wishes = {
        "device": "cpu",
        "kernel": "native",
        "kv_memory": 1 << 20,
        "kv_prefill": "exact",
        "page_size": 32,
        "max_model_len": 99,
        "max_num_seqs": 3,
        "max_batch_tokens": 77,
        "prefix_caching": False,
        "threads": 2,
    }
    engine = load(wishes | {"kv": "f16:w8"}).engine(tmp_path)
    assert engine == EngineConfig(model=str(tmp_path), kv_policy="f16:w8", **wishes)  # type: ignore[arg-type]


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        ServerConfig().port = 3


@pytest.mark.parametrize("line", ["port = true", "threads = 1.0", "max-num-seqs = true", 'port = "80"', "model = 7"])
def test_file_values_have_the_type_of_the_setting(tmp_path: Path, line: str) -> None:
    """Bug: `port = true` listens on port 1."""
    file = tmp_path / "nibble.toml"
    file.write_text(line)
    with pytest.raises(SettingsError, match=rf"nibble.toml: {line.split(maxsplit=1)[0]} must be "):
        load({}, file)


def test_file_values_of_every_type(tmp_path: Path) -> None:
    file = tmp_path / "nibble.toml"
    lines = ['chat-template = "x.jinja"', "kv-memory = 77", 'max-body-size = "1k"', 'device = "cpu"']
    file.write_text("\n".join([*lines, "offline = true", "drain-seconds = 1", "threads = 2"]))
    settings = load({}, file)
    assert (settings.offline, settings.chat_template, settings.drain_seconds) == (True, Path("x.jinja"), 1.0)
    assert (settings.kv_memory, settings.device, settings.threads) == (77, "cpu", 2)
    assert settings.max_body_size == 1024


def test_one_setting_spelt_twice_in_the_file_is_an_error(tmp_path: Path) -> None:
    """Bug: an internal error of zip(), or one of the two wins and nobody knows which."""
    file = tmp_path / "nibble.toml"
    file.write_text('kv-memory = "1GiB"\nkv_memory = "2GiB"\n')
    with pytest.raises(SettingsError, match="kv_memory is set twice"):
        load({}, file)


@pytest.mark.parametrize(
    ("variable", "hint"),
    [("NIBBLE_PROT", "did you mean NIBBLE_PORT?"), ("NIBBLE_KV_MEM", "NIBBLE_KV_MEMORY"), ("nibble_xyzzy", "--help")],
)
def test_unknown_variables_are_errors(variable: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a misspelt variable is ignored and the server runs with a default nobody chose."""
    monkeypatch.setenv(variable, "1")
    with pytest.raises(SettingsError, match=f"{variable} is not a setting") as error:
        load({})
    assert hint in str(error.value)


@pytest.mark.parametrize("variable", ["NIBBLE_SERVICE_HOST", "NIBBLE_PORT_8000_TCP_ADDR", "NIBBLE_PUBLISH"])
def test_variables_of_others_are_left_alone(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: Kubernetes describes a Service called nibble in such variables, and the server refuses to start."""
    monkeypatch.setenv(variable, "1")
    assert load({}).port == 8000


def test_a_port_from_kubernetes_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIBBLE_PORT", "tcp://10.0.0.1:8000")
    with pytest.raises(SettingsError, match="enableServiceLinks"):
        load({})


@pytest.mark.parametrize("name", ["model", "host", "served_name"])
def test_empty_texts_are_errors(name: str) -> None:
    """Bug: `nibble serve ""`, of a script whose variable is empty, serves the current folder."""
    with pytest.raises(SettingsError, match=flag_name(name)):
        load({name: ""})


def test_help_offers_only_precisions_the_engine_has() -> None:
    """Bug: --help names a cache policy that is an error."""
    offered = str(ServerConfig.model_fields["kv"].description).removesuffix(".").split(": ", 1)[1]
    for name in offered.replace(" or ", ", ").split(", "):
        assert read_policy(name).layers(num_layers=2, head_dim=128)
