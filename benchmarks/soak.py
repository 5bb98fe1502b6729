"""Does a server stay as it was?  python -m benchmarks.soak [--minutes 15] [--rate R] [--seed 0]

Starts `nibble serve` with the demo model and a small cache, and sends requests at 80 % of what it can take (found by
`nibble bench sweep`, or R a second): most are read to the end, some are cut off by the caller, some are wrong, some are
read slowly. Three things are checked:

    nothing leaks   idle before and after: KV pages held, tasks, open files are the same; memory has not grown
    nothing is lost every request ends as it should, and the server has counted as many answers as were read
    nothing ages    p99 of the time to first token and between tokens, in each third of the run

On a machine that others use too, the rate may exceed what is left of it: requests that the full queue refuses with 503
are counted, and are not lost. The last line is a JSON object; the exit status is 1 when something leaked or was lost.
"""

import argparse
import asyncio
import dataclasses
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.monitoring import ROOT, free_port, running
from server.bench.arrivals import Arrivals
from server.bench.client import Outcome, Target, ask
from server.bench.datasets import Lengths, Prompt, shared_prefix_prompts
from server.bench.load import new_client
from server.bench.results import percentile

KV_MEMORY = "32MiB"  # filled at first: from then on pages are taken from the prefix cache, and all memory is touched
LENGTHS = Lengths(input_words=64, output_tokens=48, spread=0.5)
KINDS = {"whole": 0.7, "cancelled": 0.12, "slow": 0.1, "wrong": 0.08}
SLO = "ttft=1s,tpot=50ms"  # of the sweep that finds the capacity
SHARE = 0.8  # of the capacity
FILLING_TOKENS = 1024  # of a prompt
MAX_FILLING = 400
WARM_UP_SHARE = 0.2  # of the run, before the first look at what is held
SLOW_S = 0.05  # between two reads of a slow reader
MEMORY_GROWTH = 0.05  # allocators keep what they have had once
IDLE_LIMIT_S = 60.0
FULL = 503
CROWD = 320  # --max-num-seqs + --max-queued-requests, as they are by default
CROWD_LIMIT_S = 600.0
WRONG: tuple[tuple[dict[str, Any], int], ...] = (
    ({"model": "demo", "prompt": "a", "max_token": 1}, 400),
    ({"model": "demo", "prompt": "a", "temperature": 9}, 400),
    ({"model": "demo", "prompt": "a", "max_tokens": 10**6}, 400),
    ({"model": "another", "prompt": "a"}, 404),
)


@dataclass(frozen=True)
class Held:
    """What the two processes hold, by /metrics."""

    pages: float
    requests: float
    tasks: float
    server_files: float
    engine_files: float
    server_bytes: float
    engine_bytes: float
    answers: float  # choices that ended well, so far


@dataclass
class Tally:
    """What became of the requests."""

    ended: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    refused: int = 0  # told to come again later, by 503
    lost: list[str] = field(default_factory=list)
    whole: list[Outcome] = field(default_factory=list)
    num_read: int = 0  # answers read to their ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--rate", type=float, help="requests a second; default: 80 %% of the capacity")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "server.cli", "serve", "--port", str(port), "--kv-memory", KV_MEMORY]
        with running(command, f"{url}/ready", Path(folder) / "log"):
            fill(url)
            asyncio.run(crowd(url))
            rate = args.rate or SHARE * capacity(url)
            seconds = args.minutes * 60
            asyncio.run(send(url, rate, seconds * WARM_UP_SHARE, args.seed))
            before = idle(url)
            tally = asyncio.run(send(url, rate, seconds * (1 - WARM_UP_SHARE), args.seed + 1))
            after = idle(url)
    sys.exit(report(rate, args.minutes, tally, before, after))


def fill(url: str) -> None:
    """Prompts that have nothing in common, until the prefix cache holds nearly all pages."""
    rng = random.Random(0)
    for _ in range(MAX_FILLING):
        values = scrape(url)
        if values["nibble_kv_pages_cached"] > 0.9 * values["nibble_kv_pages_total"]:
            return
        body = {"model": "demo", "prompt": rng.choices(range(100, 500), k=FILLING_TOKENS), "max_tokens": 1}
        httpx.post(f"{url}/v1/completions", json=body, timeout=120.0).raise_for_status()
    sys.exit(f"the cache of {KV_MEMORY} is not full after {MAX_FILLING} prompts")


async def crowd(url: str) -> None:
    """As many requests at once as the server takes, so that a crowd later on needs no memory that was not there."""
    tally, target = Tally(), Target(url, "demo", "completions", {"ignore_eos": True})
    async with new_client(None, CROWD_LIMIT_S) as client, asyncio.TaskGroup() as group:
        for prompt in shared_prefix_prompts(CROWD, LENGTHS, -1, 4, 128):
            group.create_task(whole(client, target, prompt, Outcome(0, 0), tally))
    if tally.lost or tally.refused:
        sys.exit(f"{CROWD} requests at once: {tally.refused} were refused, lost were {tally.lost}")


def capacity(url: str) -> float:
    """The highest rate that keeps SLO, in requests a second."""
    command = [sys.executable, "-m", "server.cli", "bench", "sweep", url, "--slo", SLO, "--dataset", "shared-prefix"]
    command += ["--prefix-len", "128", "--input-len", str(LENGTHS.input_words), "--spread", str(LENGTHS.spread)]
    command += ["--output-len", str(LENGTHS.output_tokens), "--ignore-eos", "--rate", "8", "--duration", "10", "--json"]
    done = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE)
    return float(json.loads(done.stdout)["best_rate"])


async def send(url: str, rate: float, seconds: float, seed: int) -> Tally:
    """Requests of all kinds at `rate`, and the ends of all of them."""
    prompts = shared_prefix_prompts(max(3, round(rate * seconds)), LENGTHS, seed, 4, 128)
    rng, tally = random.Random(seed), Tally()
    kinds = rng.choices(list(KINDS), list(KINDS.values()), k=len(prompts))
    target = Target(url, "demo", "completions", {"temperature": 0.0, "ignore_eos": True})
    started = time.perf_counter()
    async with new_client(None, 120.0) as client, slow_client() as slow, asyncio.TaskGroup() as group:
        times = Arrivals(rate).times(len(prompts), seed)
        for number, (at, prompt, kind) in enumerate(zip(times, prompts, kinds, strict=True)):
            await asyncio.sleep(max(0.0, at - (time.perf_counter() - started)))
            if kind == "whole":
                group.create_task(whole(client, target, prompt, Outcome(at, at), tally))
            elif kind == "wrong":
                group.create_task(wrong(client, url, number, tally))
            elif kind == "slow":
                group.create_task(read(slow, target, prompt, None, tally))
            else:
                group.create_task(read(client, target, prompt, rng.randint(0, prompt.max_tokens // 2), tally))
    return tally


def slow_client() -> httpx.AsyncClient:
    """With so small a buffer that what is not read stays with the server."""
    options = [(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)]
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(socket_options=options, limits=limits), timeout=120.0)


async def whole(client: httpx.AsyncClient, target: Target, prompt: Prompt, outcome: Outcome, tally: Tally) -> None:
    """Read to the end, as fast as it comes."""
    await ask(client, target, prompt, outcome)
    tally.ended["whole"] += 1
    if outcome.error == f"http {FULL}":
        tally.refused += 1
        return
    if outcome.error is not None or outcome.output_tokens != prompt.max_tokens:
        tally.lost.append(f"whole: {outcome.error or f'{outcome.output_tokens} of {prompt.max_tokens} tokens'}")
        return
    tally.num_read += 1
    tally.whole.append(outcome)


async def read(client: httpx.AsyncClient, target: Target, prompt: Prompt, cut: int | None, tally: Tally) -> None:
    """Read `cut` events and go; None: read all of them, slowly."""
    kind, num_events, ended = "slow" if cut is None else "cancelled", 0, False
    tally.ended[kind] += 1
    url = f"{target.url}/v1/completions"
    try:
        async with client.stream("POST", url, json=target.body(prompt)) as response:
            if response.status_code == FULL:
                tally.refused += 1
                return
            async for line in response.aiter_lines():
                if not line.startswith("data:"):
                    continue
                ended = ended or line.endswith("[DONE]")
                num_events += 1
                if cut is None:
                    await asyncio.sleep(SLOW_S)
                elif num_events > cut:
                    break
    except httpx.HTTPError as error:
        tally.lost.append(f"{kind}: {type(error).__name__}")
    if not ended and (cut is None or num_events <= cut):
        tally.lost.append(f"{kind}: cut off")
    tally.num_read += ended


async def wrong(client: httpx.AsyncClient, url: str, number: int, tally: Tally) -> None:
    """A request that must be refused."""
    body, status = WRONG[number % len(WRONG)]
    try:
        response = await client.post(f"{url}/v1/completions", json=body)
    except httpx.HTTPError as error:
        tally.lost.append(f"wrong: {type(error).__name__}")
    else:
        if response.status_code != status:
            tally.lost.append(f"wrong: {response.status_code} in place of {status}")
    tally.ended["wrong"] += 1


def idle(url: str) -> Held:
    """What is held once nothing runs; what is held after IDLE_LIMIT_S if that never happens."""
    deadline = time.monotonic() + IDLE_LIMIT_S
    while True:
        time.sleep(1.0)  # the engine sends its figures, and connections are closed
        now = held(url)
        if (now.pages == 0 and now.requests == 0) or time.monotonic() > deadline:
            return now


def scrape(url: str) -> dict[str, float]:
    """Every sample by name, summed over its labels."""
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return values


def held(url: str) -> Held:
    values = scrape(url)
    return Held(
        pages=values["nibble_kv_pages_used"],
        requests=values["nibble_num_requests_running"] + values["nibble_num_requests_waiting"],
        tasks=values["nibble_asyncio_tasks"],
        server_files=values["process_open_fds"],
        engine_files=values["nibble_engine_process_open_fds"],
        server_bytes=values["process_resident_memory_bytes"],
        engine_bytes=values["nibble_engine_process_resident_memory_bytes"],
        answers=values["nibble_request_success_total"],
    )


def leaks(before: Held, after: Held) -> list[str]:
    """What there is more of than there was, each in words."""
    found = [
        f"{name}: {getattr(after, name):g} held by nobody" for name in ("pages", "requests") if getattr(after, name)
    ]
    for name in ("tasks", "server_files", "engine_files"):
        if getattr(after, name) > getattr(before, name):
            found.append(f"{name}: {getattr(before, name):g} before, {getattr(after, name):g} after")
    for name in ("server_bytes", "engine_bytes"):
        if getattr(after, name) > getattr(before, name) * (1 + MEMORY_GROWTH):
            found.append(f"{name}: {getattr(before, name) / 1e6:.1f} MB before, {getattr(after, name) / 1e6:.1f} after")
    return found


def thirds(outcomes: list[Outcome]) -> list[dict[str, float]]:
    """p99 in milliseconds of each third of the run, by sending time."""
    end = max((outcome.scheduled for outcome in outcomes), default=0.0) + 1e-9
    rows = []
    for number in range(3):
        part = [outcome for outcome in outcomes if int(3 * outcome.scheduled / end) == number]
        first = sorted(outcome.ttft for outcome in part if outcome.ttft is not None)
        gaps = sorted(gap for outcome in part for gap in outcome.gaps)
        rows.append({"requests": len(part), "ttft_p99_ms": 1e3 * percentile(first, 99)})
        rows[-1]["itl_p99_ms"] = 1e3 * percentile(gaps, 99)
    return rows


def report(rate: float, minutes: float, tally: Tally, before: Held, after: Held) -> int:
    """Print what was found; the exit status."""
    missing = tally.num_read - (after.answers - before.answers)
    found, rows = leaks(before, after), thirds(tally.whole)
    print(f"{rate:.2f} requests a second for {minutes:g} minutes: {tally.ended}")
    if tally.refused:
        print(f"REFUSED {tally.refused} requests, by a full queue")
    for kind in sorted(set(tally.lost)):
        print(f"LOST    {tally.lost.count(kind)} x {kind}")
    if missing > 0:
        print(f"LOST    {missing:g} answers were read that the server did not count")
    for leak in found:
        print(f"LEAK    {leak}")
    for name in ("tasks", "server_files", "engine_files", "server_bytes", "engine_bytes"):
        print(f"{name:>13}: {getattr(before, name):,.0f} -> {getattr(after, name):,.0f}")
    for number, row in enumerate(rows, start=1):
        print(f"third {number}: " + ", ".join(f"{name} {value:.1f}" for name, value in row.items()))
    result = {
        "benchmark": "soak",
        "rate": rate,
        "minutes": minutes,
        "ended": tally.ended,
        "refused": tally.refused,
        "lost": len(tally.lost),
        "leaks": found,
        "before": dataclasses.asdict(before),
        "after": dataclasses.asdict(after),
        "thirds": rows,
    }
    print(json.dumps(result))
    return int(bool(found or tally.lost or missing > 0))


if __name__ == "__main__":
    main()
