"""nibble: the command line. `nibble serve` begins here and goes on in `serving`, which takes longer to import."""

import inspect
import logging
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
import typer
from pydantic.fields import FieldInfo
from rich.console import Console

from engine.client import (
    GGUF,
    EngineUnavailable,
    calibrate_model,
    conversion_forecast,
    convert_model,
    inspect_model,
    locate_model,
    start_engine,
)
from engine.messages import CalibrationSettings, ConversionSettings
from server import config, screen
from server.bench.cli import bench
from server.calibration import CalibrationBar, print_calibration
from server.interrupts import leaving_on_signals
from server.keys import KeyRing
from server.main import INTERRUPTED
from server.ports import Sockets, bound, fail, say

NOT_LOADED = "Stopped while the model was loading: nothing was served"
DEMO = Path(__file__).resolve().parent.parent / "demo" / "checkpoint"

cli = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
cli.add_typer(bench, name="bench")


@cli.callback(invoke_without_command=True)
def nibble(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """The inference server for language models that are already quantized."""
    if version:
        print(f"nibble {screen.nibble_version()}")
        raise typer.Exit


def serve(config_file: Path | None, **flags: Any) -> None:
    """Serve a quantized model over an OpenAI-compatible API.

    MODEL is a folder, a GGUF file, a Hugging Face id, or owner/name:file.gguf; without it, the bundled demo model is
    served under the name "demo".

    Every option may also be a line of the --config file (port = 8000) or a variable (NIBBLE_PORT=8000).
    Options win over the file, the file over the environment.
    """
    try:
        settings = config.load(flags, config_file)
        set_up_logging(settings.log_level)
        keys = KeyRing(settings.api_key, settings.api_keys)
    except ValueError as error:  # SettingsError, KeyFileError
        fail(str(error), 2)
    try:
        with bound(settings) as sockets:
            serve_at(sockets, settings, keys)
    except KeyboardInterrupt:  # before there is a server that hears of signals
        fail(NOT_LOADED, INTERRUPTED)


def serve_at(sockets: Sockets, settings: config.ServerConfig, keys: KeyRing) -> None:
    """Let the engine load the model, and meanwhile import and read all that the rest of a server needs."""
    with ExitStack() as stack:
        try:
            folder = model_folder(settings)
            name = settings.served_name or served_name(settings.model)
            bar = screen.LoadingBar(Console(stderr=True, highlight=False), name)  # standard output is the access log's
            stack.callback(bar.stop)
            engine = stack.enter_context(start_engine(settings.engine(folder), bar.update))
        except ValueError as error:
            fail(str(error), 2)
        except EngineUnavailable as error:
            fail(str(error), 1)

        def leave() -> None:
            stack.close()
            say(NOT_LOADED)

        with leaving_on_signals(leave):
            from server import serving

            given = serving.Given(settings, folder, name, keys, sockets)
            parts = serving.prepare(given, engine)
        try:
            serving.serve(given, parts, engine, bar)
        except serving.Interrupted as stopped:
            bar.stop()
            fail(NOT_LOADED, 128 + stopped.signal)


def inspect_command(config_file: Path | None, as_json: bool | None, **flags: Any) -> None:
    """Show what a model needs and what this machine gives: kernels, bytes read per token, the cache, tokens/s.

    Loads the model; takes the settings of nibble serve that concern the engine.
    """
    try:
        settings = config.load(flags, config_file)
        set_up_logging(settings.log_level)
        folder = model_folder(settings)
        bar = screen.LoadingBar(Console(stderr=True), served_name(settings.model))
        with bar:
            inspection = inspect_model(settings.engine(folder), bar.update)
    except ValueError as error:
        fail(str(error), 2)
    except EngineUnavailable as error:
        fail(str(error), 1)
    if as_json:
        print(msgspec.json.encode(inspection).decode())
    else:
        screen.print_inspection(Console(highlight=False), inspection)


def convert_command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A folder or a Hugging Face id, in 16 or 32 bits.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write; it must not exist.")],
    scheme: Annotated[
        str | None,
        typer.Option(
            help="rtn[:bN][:gN][:asym][:clip], mxint8, mxfp4, nvfp4, nvint4, ptqtp[:gN] or lowrank[:pN]; :hN adds a "
            "Hadamard transform of N channels."
        ),
    ] = None,
    recover: Annotated[
        bool, typer.Option("--recover", help="Find the exact codes of weights that are rounded already.")
    ] = False,
    keep: Annotated[
        list[str] | None, typer.Option(help="Leave linear layers of this name as they are: a regular expression.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a checkpoint in Nibble's container: quantize its linear layers, or recover the codes they already hold.

    Takes --scheme or --recover, one of the two. Started again after an interruption it continues with the first shard
    that is not written.
    """
    if recover == (scheme is not None):
        fail("nibble convert takes either --recover or --scheme", 2)
    bar = screen.LoadingBar(Console(stderr=True), source, "Converting")
    try:
        folder, settings = locate_model(source), ConversionSettings(scheme, tuple(keep or ()))
        for line in conversion_forecast(folder, settings):
            screen.print_note(bar.console, line)
        bar.start()
        conversion = convert_model(folder, destination, settings, bar.update)
    except ValueError as error:
        bar.stop()
        fail(str(error), 2)
    except OSError as error:  # a full disk; what is finished stays, and is where the next run begins
        bar.stop()
        fail(f"{error.filename or destination}: {error.strerror or error}. Started again, it continues from here", 1)
    finally:
        bar.stop()
    if as_json:
        print(msgspec.json.encode(conversion).decode())
    else:
        screen.print_conversion(Console(highlight=False), conversion)


def calibrate_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a GGUF file or a Hugging Face id.")],
    data: Annotated[Path, typer.Option(metavar="FILE", help="UTF-8 text of the kind that will be served.")],
    policy: Annotated[str, typer.Option(help="What to calibrate for: skvq:k2v2, skvq:k4v2:g32, ...")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write. Default: kvcal.safetensors beside the model.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Most tokens of the text to use.")] = 16384,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Search how a quantized KV cache of this model loses least, and write it down beside the model.

    Runs the model over the text in floating point, layer by layer, and needs no GPU.
    """
    bar = CalibrationBar(Console(stderr=True), model)
    try:
        folder = str(locate_model(model))
        named = None if out is None else str(out)
        bar.start()
        report = calibrate_model(CalibrationSettings(folder, str(data), policy, named, tokens), bar.update)
    except ValueError as error:
        bar.stop()
        fail(str(error), 2)
    finally:
        bar.stop()
    if as_json:
        print(msgspec.json.encode(report).decode())
    else:
        print_calibration(Console(highlight=False), report, model)


def set_up_logging(level: config.LogLevel) -> None:
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if level != "debug":  # uvicorn tells of every start and stop
        logging.getLogger("uvicorn").setLevel(logging.WARNING)


def model_folder(settings: config.ServerConfig) -> Path:
    """The folder or GGUF file to serve, or the bundled demo. Raises ValueError saying what is missing."""
    if settings.model is None and not DEMO.is_dir():
        raise ValueError("This installation has no demo model; name a model: nibble serve MODEL")
    if settings.model is None and settings.revision is not None:
        raise ValueError(
            f"--revision {settings.revision} is of a model on the hub, and the bundled demo model is not from there: "
            "name a model, or leave --revision away"
        )
    folder = locate_model(settings.model, settings.revision, settings.offline) if settings.model else DEMO
    if folder.suffix != GGUF and not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is not a model folder: it has no config.json. Name the folder that holds it beside the weights, "
            "or a GGUF file"
        )
    return folder


def served_name(model: str | None) -> str:
    """The name clients use: the hub id, or the last part of a path, without ".gguf"."""
    if model is None:
        return "demo"
    path = Path(model).expanduser()
    return path.resolve().name.removesuffix(GGUF) if path.exists() else model


def with_settings(command: Any, names: Collection[str], *others: inspect.Parameter) -> Any:
    """Give `command` one option for each setting named, so that help, file and environment can never disagree."""
    file = Annotated[Path | None, typer.Option("--config", help="TOML file of settings.", metavar="FILE")]
    parameters = [_parameter("config_file", file), *others]
    for name in names:
        field = config.ServerConfig.model_fields[name]
        kind = bool if field.annotation is bool else str  # pydantic parses and checks the rest
        parameters.append(_parameter(name, Annotated[kind | None, _option(name, field)]))
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _option(name: str, field: FieldInfo) -> Any:
    """The option of a setting; the model is the one argument."""
    if name == "model":
        return typer.Argument(help=field.description, show_default=False, metavar="MODEL")
    flag = config.flag_name(name)
    extra = field.json_schema_extra
    assert isinstance(extra, dict)
    shown = screen.size(field.default) if field.default and config.Size in config.kinds(field) else field.default
    shown = "on" if field.default is True else shown
    default = "" if field.default in (None, False) else f" Default: {shown}."
    return typer.Option(
        f"{flag}/--no-{flag[2:]}" if field.annotation is bool else flag,
        help=f"{field.description}{default}",
        rich_help_panel=str(extra["panel"]),
        metavar=_metavar(field),
        show_default=False,
    )


def _metavar(field: FieldInfo) -> str:
    """What --help shows for a value: the choices, or N, or text."""
    if get_origin(field.annotation) is Literal:
        return "|".join(map(str, get_args(field.annotation)))
    if field.annotation is bool:
        return ""
    kinds = config.kinds(field)
    if config.Size in kinds:
        return "SIZE"
    return "N" if kinds & {int, float} else "FILE" if Path in kinds else "TEXT"


def _help(command: Any) -> str:
    """What its docstring says, without the line breaks that --help would keep inside a paragraph."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in command.__doc__.split("\n\n"))


cli.command(help=_help(serve))(with_settings(serve, list(config.ServerConfig.model_fields)))
JSON = _parameter("as_json", Annotated[bool | None, typer.Option("--json", help="Print one JSON object.")])
cli.command("inspect", help=_help(inspect_command))(with_settings(inspect_command, config.ENGINE_SETTINGS, JSON))
cli.command("convert", help=_help(convert_command), no_args_is_help=True)(convert_command)
cli.command("calibrate", help=_help(calibrate_command), no_args_is_help=True)(calibrate_command)


if __name__ == "__main__":
    cli()
