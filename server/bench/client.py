"""One streamed request, timed."""

import json
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from server.bench.datasets import Prompt
from server.bench.errors import BenchError

Endpoint = Literal["completions", "chat"]
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
MODELS_LIMIT_S = 30.0
ANSWER_CHARS = 300  # kept of an error


@dataclass(frozen=True)
class Target:
    """The server and how it is asked."""

    url: str  # without /v1
    model: str
    endpoint: Endpoint
    extra: dict[str, Any] = field(default_factory=dict)  # more fields of every body
    metrics_url: str | None = None  # None: /metrics below url

    def body(self, prompt: Prompt) -> dict[str, Any]:
        content: dict[str, Any] = {"prompt": prompt.text}
        if self.endpoint == "chat":
            content = {"messages": [{"role": "user", "content": prompt.text}]}
        return {
            "model": self.model,
            **content,
            "max_tokens": prompt.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra,
        }


@dataclass
class Outcome:
    """What became of a request. Times are seconds."""

    scheduled: float  # from the start of the run
    sent: float  # likewise; later than scheduled when too many were in flight
    ttft: float | None = None  # from sending to the first text
    gaps: list[float] = field(default_factory=list)  # between two pieces of text
    latency: float = 0.0  # from sending to the end
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    error: str | None = None  # its kind; None: answered whole
    answer: str = ""  # the beginning of what the server said of the error
    is_resent: bool = False  # the server closed a kept connection instead of answering; the clock ran on

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first; None for answers of one token."""
        if self.ttft is None or self.output_tokens < 2:
            return None
        return (self.latency - self.ttft) / (self.output_tokens - 1)


def check_url(url: str, option: str) -> None:
    """Raises BenchError for what cannot be asked, whoever listens."""
    if not url.startswith(("http://", "https://")):
        raise BenchError(f"{option} must begin with http:// or https://: did you mean http://{url}?")
    try:
        if httpx.URL(url).host:
            return
        reason = "it names no host"
    except httpx.InvalidURL as error:
        reason = str(error)
    raise BenchError(f"{option} {url} is none: {reason}")


async def find_model(client: httpx.AsyncClient, url: str) -> str:
    """The first model that the server lists. Raises BenchError when there is no such server."""
    try:
        response = await client.get(f"{url}/v1/models", timeout=MODELS_LIMIT_S)
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except httpx.HTTPStatusError as error:
        raise BenchError(
            f"{url}/v1/models answered {error.response.status_code}: {error.response.text[:200]}"
        ) from None
    except httpx.HTTPError as error:
        distrust = "CERTIFICATE_VERIFY_FAILED" in str(error)
        advice = "name its certificate: SSL_CERT_FILE=cert.pem nibble bench ..." if distrust else "is it running?"
        raise BenchError(f"no answer from {url}/v1/models ({type(error).__name__}: {error}); {advice}") from None
    except (ValueError, LookupError, TypeError):
        raise BenchError(f"{url}/v1/models is not an OpenAI-compatible list of models; name one with --model") from None


async def ask(client: httpx.AsyncClient, target: Target, prompt: Prompt, outcome: Outcome) -> None:
    """Send one request and fill in its outcome. Never raises what a server or a network can cause."""
    started = time.perf_counter()
    try:
        if not await _exchange(client, target, prompt, outcome, started):
            outcome.is_resent = True
            await _exchange(client, target, prompt, outcome, started)
    except httpx.TimeoutException as error:
        outcome.error = f"timeout ({type(error).__name__})"
    except httpx.ConnectError:
        outcome.error = "connection refused"
    except httpx.HTTPError as error:
        outcome.error = f"connection lost ({type(error).__name__})"
    except (AttributeError, TypeError, ValueError):
        outcome.error = "not OpenAI's events"
    outcome.latency = time.perf_counter() - started


async def _exchange(
    client: httpx.AsyncClient, target: Target, prompt: Prompt, outcome: Outcome, started: float
) -> bool:
    """One request and its answer. False when the connection ended before an answer began: servers may close one that
    was kept from the request before just as this one is sent (llama-server does, for 3 in 100)."""
    is_answered = False
    try:
        async with client.stream("POST", target.url + PATHS[target.endpoint], json=target.body(prompt)) as response:
            is_answered = True
            if response.status_code == 200:
                await _read(response, outcome, started)
            else:
                await response.aread()
                outcome.error, outcome.answer = f"http {response.status_code}", response.text[:ANSWER_CHARS]
    except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
        if is_answered or outcome.is_resent:
            raise
        return False
    return True


async def _read(response: httpx.Response, outcome: Outcome, started: float) -> None:
    """The events of a stream, to its end."""
    last, num_pieces, ended = started, 0, False
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            ended = True
            continue
        try:
            event = json.loads(data)
        except ValueError:
            outcome.error = "not JSON"
            return
        if (error := event.get("error")) is not None:
            outcome.error = f"stream error ({str(error.get('code') if isinstance(error, dict) else error)[:80]})"
            return
        if _has_text(event):
            now = time.perf_counter()
            num_pieces += 1
            if outcome.ttft is None:
                outcome.ttft = now - started
            else:
                outcome.gaps.append(now - last)
            last = now
        _count(event.get("usage"), outcome)
    outcome.output_tokens = outcome.output_tokens or num_pieces  # servers that count no tokens: pieces of text
    if not ended:
        outcome.error = "cut off"
    elif outcome.ttft is None:
        outcome.error = "no text: the answer ended at once (--ignore-eos goes on)"


def _has_text(event: dict[str, Any]) -> bool:
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        if choice.get("text") or delta.get("content") or delta.get("reasoning_content"):
            return True
    return False


def _count(usage: dict[str, Any] | None, outcome: Outcome) -> None:
    if usage:
        outcome.prompt_tokens = usage.get("prompt_tokens") or 0
        outcome.output_tokens = usage.get("completion_tokens") or 0
        outcome.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
