"""The official client against a real server process."""

import concurrent.futures
import random
import shutil
import signal
import time
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from tests.e2e.process import ServerProcess


@pytest.fixture
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_stream_equals_no_stream(client: openai.OpenAI) -> None:
    """Bug: text lost or doubled between the pieces of a stream."""
    whole = client.completions.create(model="tiny", prompt="Hello", max_tokens=40, temperature=0)
    pieces = list(client.completions.create(model="tiny", prompt="Hello", max_tokens=40, temperature=0, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (5, 40)


def test_chat_streams_and_counts(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hi"}],
        max_tokens=12,
        seed=5,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens <= 12


def test_same_seed_same_text_whatever_runs_beside_it(client: openai.OpenAI) -> None:
    def ask(prompt: str, seed: int) -> str:
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=24, temperature=0.8, seed=seed)
        return answer.choices[0].text

    alone = ask("Once", 7)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        crowd = [pool.submit(ask, "x" * (3 * i + 1), i) for i in range(5)]
        beside = pool.submit(ask, "Once", 7).result()
        concurrent.futures.wait(crowd)
    assert beside == alone


def test_closed_connection_frees_its_pages(server: ServerProcess) -> None:
    """Bug: a stream nobody reads runs to its end and holds its pages."""
    body = {"model": "tiny", "prompt": "a", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    before = server.metric("nibble_generation_tokens_total")
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as response:
        next(response.iter_lines())
    server.wait_idle()
    assert server.metric("nibble_generation_tokens_total") - before < 1900


def test_unknown_model_and_bad_field_name_what_is_wrong(client: openai.OpenAI, server: ServerProcess) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        client.completions.create(model="gpt-9", prompt="a")
    response = httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "a", "tempreature": 1})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tempreature"


def one_request(url: str, number: int) -> str:
    """Send the request with that number; returns how it ended."""
    rng = random.Random(number)
    body = {
        "model": "tiny",
        "prompt": "shared beginning " * rng.randrange(1, 9) + chr(97 + number % 26) * rng.randrange(1, 60),
        "max_tokens": rng.randrange(1, 60),
        "temperature": rng.choice([0, 1]),
        "stream": True,
        "n": rng.choice([1, 1, 1, 2]),
    }
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as response:
        assert response.status_code == 200
        leave_after = rng.randrange(1, 30) if number % 4 == 0 else None
        for i, line in enumerate(response.iter_lines()):
            if line == "data: [DONE]":
                return "done"
            assert '"error"' not in line
            if leave_after is not None and i > leave_after:
                return "left"
    return "cut"


def test_two_hundred_mixed_requests_all_end_and_leave_nothing(server: ServerProcess) -> None:
    """Bug: any lost request, leaked page or growing memory under mixed load with clients that leave."""
    engine = psutil.Process(server.process.pid).children(recursive=True)[0]
    resident = []
    for half in range(2):
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            numbers = range(100 * half, 100 * half + 100)
            endings = list(pool.map(lambda number: one_request(server.url, number), numbers))
        assert set(endings) <= {"done", "left"}
        assert endings.count("done") >= 75
        server.wait_idle()
        resident.append(engine.memory_info().rss + psutil.Process(server.process.pid).memory_info().rss)
    # The second hundred repeats the first's work: what it adds is a leak. 16 MiB is allocator noise, 80 KiB a request.
    assert resident[1] - resident[0] < 16 << 20


def test_engine_death_is_survived(checkpoint: Path, tmp_path: Path) -> None:
    """Bug: a dead engine leaves clients waiting for ever, or takes the server with it."""
    with ServerProcess(checkpoint, tmp_path / "log", ["--served-name", "tiny"]).wait_ready() as server:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 2000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            psutil.Process(server.process.pid).children(recursive=True)[0].kill()
            rest = "\n".join(lines)
        assert '"error"' in rest
        assert httpx.get(f"{server.url}/health").status_code == 200
        server.wait_ready()
        answer = httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 3})
        assert answer.status_code == 200


def test_sigterm_drains_and_exits_zero(checkpoint: Path, tmp_path: Path) -> None:
    """Bug: a deploy that cuts running streams, or a process that never ends."""
    with ServerProcess(checkpoint, tmp_path / "log", ["--drain-seconds", "30"]).wait_ready() as server:
        body = {"model": checkpoint.name, "prompt": "a", "max_tokens": 1900, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 5
            while httpx.get(f"{server.url}/ready").status_code == 200 and time.monotonic() < deadline:
                time.sleep(0.01)  # until the signal has arrived
            refused = httpx.post(f"{server.url}/v1/completions", json={**body, "stream": False}, timeout=10)
            assert refused.status_code == 503
            assert "retry-after" in refused.headers
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        assert server.process.wait(30) == 0


def test_model_that_cannot_be_served_ends_with_the_reason(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text('{"architectures": ["NopeForCausalLM"], "model_type": "nope"}')
    with ServerProcess(tmp_path, tmp_path / "log") as server:
        assert server.process.wait(60) != 0
        assert "NopeForCausalLM" in server.output()
        assert "Traceback" not in server.output()
