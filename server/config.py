"""Every setting, in one list: flag --kv-memory, file key kv-memory, environment NIBBLE_KV_MEMORY.

Flags win over the file, the file over the environment, the environment over the defaults. This is the only module
that reads os.environ (through pydantic-settings). What comes out is frozen.
"""

import os
import re
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from engine.config import PAGE_SIZES, Activations, Device, EngineConfig, HeadBits, Prefill
from server.complaints import complaint

LogLevel = Literal["debug", "info", "warning", "error"]
PREFIX = "NIBBLE_"
# Set by Kubernetes for a Service called nibble, and by docker-compose.yml's own port.
NOT_OURS = re.compile(r"_SERVICE_(HOST|PORT)|_PORT_\d+_(TCP|UDP)|^NIBBLE_PUBLISH$")
UNITS = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for suffix, base in (("", 1024), ("ib", 1024), ("b", 1000))
}
# As browsers send it.
ORIGIN = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:(?P<port>[1-9][0-9]{0,4}))?")
OWN_PORTS = MappingProxyType({"http": "80", "https": "443"})


class SettingsError(ValueError):
    """A setting cannot be read; the message names it."""


def parse_size(value: object) -> object:
    """Bytes from "4GiB", "512M" (both powers of 1024), "2GB" (powers of 1000) or a plain number."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
    if match is None or match[2].lower() not in UNITS:
        raise ValueError(f"'{value}' is not a size; write it like 4GiB, 512MiB or 2GB")
    return int(float(match[1]) * UNITS[match[2].lower()])


def parse_number(value: object) -> object:
    """An integer from its digits: what a flag or a variable gives for a choice of numbers."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def check_origins(value: str) -> str:
    """ "*", or origins as browsers send them, with commas between them: what differs from those would never match."""
    if value == "*":
        return value
    for origin in (part.strip() for part in value.split(",")):
        match = ORIGIN.fullmatch(origin)
        if match is None or match["port"] == OWN_PORTS.get(match["scheme"], ""):
            raise ValueError(
                f"'{origin}' is not an origin; write scheme://host or scheme://host:port as browsers do (in small "
                "letters, no path, not the scheme's own port), with commas between several, or * alone for all pages"
            )
    return value


Size = Annotated[int, BeforeValidator(parse_size)]  # bytes
Text = Annotated[str, Field(min_length=1)]
Origins = Annotated[str, AfterValidator(check_origins)]


def setting(default: Any, panel: str, help: str, **limits: Any) -> Any:
    """A field of ServerConfig: `panel` groups it in --help."""
    return Field(default, description=help, json_schema_extra={"panel": panel}, **limits)


class ServerConfig(BaseSettings):
    """What `nibble serve` was told."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", env_ignore_empty=True, protected_namespaces=()
    )

    model: Text | None = setting(
        None, "Model", "Folder, GGUF file or Hugging Face id. Default: the bundled demo model."
    )
    revision: Text | None = setting(None, "Model", "Branch, tag or commit of a hub model.")
    offline: bool = setting(False, "Model", "Use only what is already on this machine.")
    served_name: Text | None = setting(None, "Model", "Name clients give as `model`. Default: hub id or folder name.")
    chat_template: Path | None = setting(None, "Model", "Jinja file to use instead of the checkpoint's chat template.")
    max_model_len: int | None = setting(
        None,
        "Model",
        "Most tokens of one request, prompt and answer. Default: the model's, as far as the cache holds them.",
        ge=1,
    )

    host: Text = setting("127.0.0.1", "Server", "Address to listen on; 0.0.0.0 for all.")
    port: int = setting(8000, "Server", "Port to listen on; 0 picks a free one.", ge=0, le=65535)
    max_queued_requests: int = setting(
        256, "Server", "Requests that may wait beyond --max-num-seqs; more get 503 with Retry-After.", ge=0
    )
    max_body_size: Size = setting(16 << 20, "Server", "Largest request body, like 16MiB; larger ones get 413.", ge=1)
    drain_seconds: float = setting(30, "Server", "How long running requests may finish after SIGTERM.", ge=0)
    tls_cert: Path | None = setting(None, "Server", "Certificate chain (PEM); serves https. Needs --tls-key.")
    tls_key: Path | None = setting(None, "Server", "Private key of --tls-cert (PEM).")
    cors_origins: Origins | None = setting(
        None,
        "Server",
        "Web pages that may call this server: origins like https://a.example with commas between them, or *. "
        "Default: none.",
    )
    ops_port: int | None = setting(
        None,
        "Server",
        "One more port, for /metrics, /health and /ready; /metrics is then nowhere else. Default: none.",
        ge=0,
        le=65535,
    )
    otlp_endpoint: Text | None = setting(
        None,
        "Server",
        "OpenTelemetry collector that gets a trace of each request, like http://localhost:4318. Default: none.",
    )
    api_key: Text | None = setting(
        None, "Access", "Key that clients must send; better set as NIBBLE_API_KEY.", repr=False
    )
    api_keys: Path | None = setting(
        None, "Access", "TOML file of named keys with limits of their own; read again when it changes."
    )
    access_log: bool = setting(
        False, "Access", "Write one JSON line for each request to standard output, which has nothing else."
    )
    log_prompts: bool = setting(False, "Access", "Put the beginning of request bodies into the access log.")
    log_level: LogLevel = setting("info", "Server", "How much to log.")

    device: Device = setting("auto", "Engine", "Where to compute.")
    kernel: Text = setting("auto", "Engine", "Insist on one back end, such as reference; fail where it refuses.")
    threads: int | None = setting(
        None,
        "Engine",
        "CPU threads, at most one per core. Default: that; one for models below 16 MiB, which run faster so.",
        ge=1,
    )
    activations: Activations = setting(
        "int8",
        "Engine",
        "What multiplies quantized weights: int8 (rounded block by block, fast) or float (exact, slow).",
    )
    head_bits: Annotated[HeadBits, BeforeValidator(parse_number)] = setting(
        8, "Engine", "Bits of an output head that the checkpoint left unquantized; 16 keeps it as it is."
    )
    max_num_seqs: int = setting(64, "Engine", "Most sequences in one step.", ge=1)
    max_batch_tokens: int = setting(512, "Engine", "Most tokens in one step; long prompts are split.", ge=1)

    kv: Text = setting(
        "auto",
        "KV cache",
        "Precision, auto (k4v4 where fast kernels serve it) or a policy: f16, k8v8, k4v4, skvq:k4v2, skvq:k2v2 or f32.",
    )
    kv_calibration: Path | None = setting(
        None, "KV cache", "Artifact for a skvq: policy. Default: kvcal.safetensors beside the model, if there."
    )
    kv_memory: Size | None = setting(
        None,
        "KV cache",
        "Memory of the cache, like 4GiB. Default: half of what is free, or what --max-num-seqs can fill.",
        ge=1,
    )
    kv_request_window: int = setting(
        0,
        "KV cache",
        "Most tokens that a request may read in float16 by its kv_policy, a longer window or f16. Default: none.",
        ge=0,
    )
    kv_prefill: Prefill = setting(
        "windowed",
        "KV cache",
        "How prompts read a quantized cache: windowed, as answers do, or exact, in float16 throughout.",
    )
    swap_memory: Size = setting(
        0,
        "KV cache",
        "Host memory for sequences that had to wait, like 2GiB. Default: none, their tokens are computed again.",
        ge=0,
    )
    page_size: int = setting(64, "KV cache", f"Tokens of one page: {', '.join(map(str, PAGE_SIZES))}.")
    prefix_caching: bool = setting(True, "Prefix cache", "Reuse the pages of prompts that begin alike.")

    def engine(self, folder: Path) -> EngineConfig:
        """The part of it that concerns the engine, for the checkpoint in `folder`."""
        return EngineConfig(
            model=str(folder),
            device=self.device,
            kernel=self.kernel,
            kv_policy=self.kv,
            kv_calibration=None if self.kv_calibration is None else str(self.kv_calibration),
            kv_memory=self.kv_memory,
            kv_request_window=self.kv_request_window,
            kv_prefill=self.kv_prefill,
            swap_memory=self.swap_memory,
            page_size=self.page_size,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_batch_tokens=self.max_batch_tokens,
            prefix_caching=self.prefix_caching,
            threads=self.threads,
            activations=self.activations,
            head_bits=self.head_bits,
        )


# The settings that `nibble inspect` takes: which model, and how it would run.
ENGINE_SETTINGS = (
    *("model", "revision", "offline", "max_model_len", "device", "kernel", "threads", "activations", "head_bits"),
    *("max_num_seqs", "max_batch_tokens", "kv", "kv_calibration", "kv_memory", "kv_prefill", "swap_memory"),
    "page_size",
)


def check_access(settings: ServerConfig, sources: Mapping[str, str]) -> None:
    """Raises SettingsError for settings that need each other, and for files that are not there."""
    if (settings.tls_cert is None) != (settings.tls_key is None):
        raise SettingsError("--tls-cert and --tls-key belong together: give both or neither")
    for name in ("tls_cert", "tls_key"):
        path: Path | None = getattr(settings, name)
        if path is not None and not path.is_file():
            raise SettingsError(f"{sources[name]}: {path} is not a file")
    if settings.port and settings.port == settings.ops_port:
        raise SettingsError(f"--ops-port and --port are both {settings.port}: give them different ones")
    if settings.log_prompts and not settings.access_log:
        raise SettingsError("--log-prompts adds to the access log: give --access-log too")
    endpoint = settings.otlp_endpoint
    if endpoint is not None and not endpoint.startswith(("http://", "https://")):
        raise SettingsError(f"{sources['otlp_endpoint']} must begin with http:// or https:// (found '{endpoint}')")


def load(flags: Mapping[str, Any], file: Path | None = None) -> ServerConfig:
    """The settings from the flags given, the file and the environment. Raises SettingsError naming the bad one."""
    check_environment(os.environ)
    in_file = read_file(file) if file else {}
    given = {name: value for name, value in flags.items() if value is not None}
    variables = {name[len(PREFIX) :].lower(): name for name in os.environ if name.upper().startswith(PREFIX)}
    sources = (
        {name: flag_name(name) for name in ServerConfig.model_fields}
        | {name: f"The variable {variable}" for name, variable in variables.items() if os.environ[variable]}
        | {name: f"--config {file}: {name.replace('_', '-')}" for name in in_file}
        | {name: flag_name(name) for name in given}
    )
    try:
        settings = ServerConfig(**in_file | given)
    except ValidationError as error:
        first = error.errors()[0]
        source = sources[str(first["loc"][0])]
        raise SettingsError(f"{source}: {complaint(first)} (found {first['input']!r})") from None
    check_access(settings, sources)
    return settings


def read_file(path: Path) -> dict[str, Any]:
    """The settings in a TOML file. Raises SettingsError for what cannot be read, is no setting, or of another type."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"--config {path}: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"--config {path}: {error}") from None
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in ServerConfig.model_fields:
            hint = nearest(name, {name: name.replace("_", "-") for name in ServerConfig.model_fields})
            raise SettingsError(f"--config {path}: '{key}' is not a setting{hint}")
        if name in values:
            raise SettingsError(f"--config {path}: {name} is set twice, with hyphens and with underscores")
        allowed = file_types(ServerConfig.model_fields[name])
        if type(value) not in allowed:  # not isinstance: true is no 1
            kinds = " or ".join(FILE_TYPES[kind] for kind in allowed)
            raise SettingsError(f"--config {path}: {key} must be {kinds} (found {value!r})")
        values[name] = value
    return values


FILE_TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


def kinds(field: FieldInfo) -> set[Any]:
    """The types a setting may have; of a plain Size, pydantic has kept the parts."""
    is_size = any(isinstance(part, BeforeValidator) and part.func is parse_size for part in field.metadata)
    return {field.annotation, *get_args(field.annotation)} | ({Size} if is_size else set())


def file_types(field: FieldInfo) -> tuple[type, ...]:
    """What TOML must give for a setting."""
    if Size in kinds(field):
        return (int, str)
    if float in kinds(field):
        return (int, float)
    if get_origin(field.annotation) is Literal:
        return tuple({type(choice) for choice in get_args(field.annotation)})
    return next(((kind,) for kind in (bool, int) if kind in kinds(field)), (str,))


def check_environment(environment: Mapping[str, str]) -> None:
    """Raises SettingsError for a variable that looks like a setting and is none."""
    known = {name: f"{PREFIX}{name.upper()}" for name in ServerConfig.model_fields}
    if environment.get("NIBBLE_PORT", "").startswith("tcp://"):
        raise SettingsError("Kubernetes has set NIBBLE_PORT for a Service called nibble: set enableServiceLinks: false")
    for variable in environment:
        if NOT_OURS.search(variable):
            continue
        if variable.upper().startswith(PREFIX) and variable[len(PREFIX) :].lower() not in known:
            hint = nearest(variable[len(PREFIX) :].lower(), known)
            raise SettingsError(f"The variable {variable} is not a setting{hint}")


def nearest(name: str, known: Mapping[str, str]) -> str:
    """A hint at what was probably meant, spelt as its place wants it."""
    matches = get_close_matches(name, known, n=1)
    return f": did you mean {known[matches[0]]}?" if matches else "; see nibble serve --help"


def flag_name(field: str) -> str:
    """How the command line names a setting."""
    return "MODEL" if field == "model" else "--" + field.replace("_", "-")
