"""Options of the commands, each stated once: a field of a dataclass, whose annotation says what --help shows."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import httpx
import typer

from server.bench.arrivals import Arrivals
from server.bench.client import Endpoint, Target, check_url, find_model
from server.bench.datasets import (
    Lengths,
    Prompt,
    folder_prompts,
    random_prompts,
    shared_prefix_prompts,
    sharegpt_prompts,
)
from server.bench.errors import BenchError
from server.bench.load import prefix_counts, run

Dataset = Literal["random", "shared-prefix", "sharegpt", "folder"]
DEFAULT_OUTPUT = 128  # tokens
WARM_UP_SEED = -1
WARM_UP_CHOICE = 100  # prompts of which the shortest warm up: of texts from files some may be longer than the context
BURSTINESS = "1 Poisson, below 1 bursts, inf evenly spaced."


@dataclass(frozen=True)
class Asked:
    """What is sent, whatever the rate."""

    url: Annotated[str, typer.Argument(metavar="URL", help="The server, like http://localhost:8000.")]
    model: Annotated[
        str | None, typer.Option(help="The name to ask for. Default: the first that the server lists.")
    ] = None
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Sent as a bearer token.")] = None
    endpoint: Annotated[Endpoint, typer.Option(help="Which route is asked.")] = "completions"
    dataset: Annotated[Dataset, typer.Option(help="Where prompts come from.")] = "random"
    data: Annotated[Path | None, typer.Option(help="The file of sharegpt, or the folder.")] = None
    input_len: Annotated[int, typer.Option(help="Words of a made-up prompt; about as many tokens.")] = 128
    output_len: Annotated[int | None, typer.Option(help="Most tokens of an answer. Default: 128, or as recorded.")] = (
        None
    )
    spread: Annotated[float, typer.Option(help="Made-up lengths vary by this share, from 0 to below 1.")] = 0.0
    prefixes: Annotated[int, typer.Option(help="shared-prefix: how many beginnings there are.")] = 4
    prefix_len: Annotated[int, typer.Option(help="shared-prefix: words of a beginning.")] = 256
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Answers of full length, where servers can.")] = False
    temperature: Annotated[float, typer.Option(help="0: the likeliest token.")] = 0.0
    seed: Annotated[int, typer.Option(help="The same seed sends the same requests at the same times.")] = 0
    warm_up: Annotated[int, typer.Option(min=0, help="Requests sent before, one by one, and not counted.")] = 1
    metrics_url: Annotated[
        str | None, typer.Option(help="Where hits of the prefix cache are. Default: URL/metrics.")
    ] = None
    timeout: Annotated[float, typer.Option(min=0.1, help="Longest silence of the server, in seconds.")] = 600.0

    @property
    def base_url(self) -> str:
        return self.url.rstrip("/").removesuffix("/v1")

    def prompts(self, count: int, seed: int) -> list[Prompt]:
        """Raises BenchError for data that is not there."""
        if count < 1:
            raise BenchError(f"--requests must be at least 1, found {count}")
        if (self.data is not None) != (self.dataset in ("sharegpt", "folder")):
            raise BenchError("--data belongs to --dataset sharegpt and folder, which need it")
        self._check_unused()
        lengths = Lengths(self.input_len, DEFAULT_OUTPUT if self.output_len is None else self.output_len, self.spread)
        if self.dataset == "shared-prefix":
            return shared_prefix_prompts(count, lengths, seed, self.prefixes, self.prefix_len)
        if self.dataset == "sharegpt" and self.data is not None:
            return sharegpt_prompts(self.data, count, seed, self.output_len)
        if self.dataset == "folder" and self.data is not None:
            return folder_prompts(self.data, count, seed, lengths.output_tokens)
        return random_prompts(count, lengths, seed)

    def _warm_up_prompts(self) -> list[Prompt]:
        drawn = self.prompts(max(self.warm_up, WARM_UP_CHOICE), WARM_UP_SEED)
        return sorted(drawn, key=lambda prompt: len(prompt.text))[: self.warm_up]

    def _check_unused(self) -> None:
        """Raises BenchError for an option that the dataset has no use for."""
        unused = ["prefixes", "prefix_len"] if self.dataset != "shared-prefix" else []
        unused += ["input_len", "spread"] if self.data is not None else []
        for field in fields(self):
            if field.name in unused and getattr(self, field.name) != field.default:
                flag = "--" + field.name.replace("_", "-")
                raise BenchError(f"{flag} says nothing about prompts of --dataset {self.dataset}")

    async def target(self, client: httpx.AsyncClient) -> Target:
        """Sends the requests of the warm-up. Raises BenchError when the server is not there or cannot answer them."""
        for option, url in (("URL", self.url), ("--metrics-url", self.metrics_url)):
            if url is not None:
                check_url(url, option)
        extra = {"temperature": self.temperature, **({"ignore_eos": True} if self.ignore_eos else {})}
        model = self.model or await find_model(client, self.base_url)
        target = Target(self.base_url, model, self.endpoint, extra, self.metrics_url)
        if self.metrics_url is not None and await prefix_counts(client, target) is None:
            raise BenchError(f"--metrics-url {self.metrics_url} has no counters of a prefix cache")
        if self.warm_up > 0:
            done = await run(client, target, self._warm_up_prompts(), Arrivals(clients=1))
            if done.outcomes[-1].error is not None:
                last = done.outcomes[-1]
                raise BenchError(f"the last request of the warm-up failed: {last.error} {last.answer}".rstrip())
        return target


@dataclass(frozen=True)
class Output:
    """Where results go."""

    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")] = False
    report: Annotated[Path | None, typer.Option(help="Write a page (.html) or a picture (.png).")] = None


@dataclass(frozen=True)
class Pace:
    """How `nibble bench serve` sends."""

    requests: Annotated[int, typer.Option(help="How many are sent.")] = 100
    rate: Annotated[float | None, typer.Option(help="Requests a second on average. Default: a closed loop.")] = None
    burstiness: Annotated[float, typer.Option(help=BURSTINESS)] = 1.0
    ramp: Annotated[float | None, typer.Option(help="The rate at the start; it grows to --rate.")] = None
    clients: Annotated[int | None, typer.Option(help="Most requests in flight. Default: 8 in a closed loop.")] = None
    slo: Annotated[str | None, typer.Option(help="Limits, like ttft=500ms,tpot=50ms or e2el=10s.")] = None

    @property
    def arrivals(self) -> Arrivals:
        clients = 8 if self.rate is None and self.clients is None else self.clients
        return Arrivals(self.rate, self.burstiness, self.ramp, clients)


@dataclass(frozen=True)
class Steps:
    """What `nibble bench sweep` looks for."""

    slo: Annotated[str, typer.Option(help="Limits, like ttft=500ms,tpot=50ms or e2el=10s.")]
    rate: Annotated[float, typer.Option(help="Where to begin, in requests a second.")] = 1.0
    duration: Annotated[float, typer.Option(min=1, help="Seconds of sending at each rate.")] = 20.0
    share: Annotated[float, typer.Option(help="Of requests that must keep the limits.")] = 0.99
    precision: Annotated[float, typer.Option(help="Of the rate found, as a share of it.")] = 0.1
    burstiness: Annotated[float, typer.Option(help=BURSTINESS)] = 1.0


def with_options(command: Callable[..., None], *parts: type) -> Callable[..., None]:
    """A command for typer that takes the fields of all `parts` as options and gives `command` one object of each."""

    def wrapper(**given: Any) -> None:
        command(*(part(**{field.name: given[field.name] for field in fields(part)}) for part in parts))

    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for part, hints in ((part, get_type_hints(part, include_extras=True)) for part in parts)
        for field in fields(part)
    ]
    wrapper.__doc__ = command.__doc__
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper
