"""Bodies that are not what they should be."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.fakes import FakeEngine
from tests.server.conftest import World

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"{nope", "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"model": "demo", "prompt": "\\ud800"}', "invalid_json"),
        (b'{"model": "demo", "prompt": "\xff"}', "invalid_json"),
        (b'{"model": "demo", "prompt": "x", "temperature": NaN}', "invalid_json"),
        (b'{"model": "demo", "prompt": "x", "max_tokens": 1, "max_tokens": 900}', "invalid_json"),
        (b'{"model": "demo", "prompt": "x", "logit_bias": {"5": 1, "\\u0035" : 2}}', "invalid_json"),
        (b"[]", "invalid_value"),
        (b"", "invalid_value"),
        (b"{}", "missing_field"),
    ],
)
async def test_broken_bodies_are_the_callers_fault(content: bytes, code: str) -> None:
    """Bug: text that cannot be encoded, or a number that is none, fails deep inside and looks like a server error."""
    world = World(FakeEngine())
    headers = {"content-type": "application/json"}
    response = await world.http.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == code


async def test_a_repeated_key_is_named_and_what_only_looks_like_one_is_not() -> None:
    """Bug: of two values for max_tokens the first is dropped without a word."""
    world = World(FakeEngine())
    headers = {"content-type": "application/json"}
    body = b'{"model": "demo", "model": "demo", "prompt": "x"}'
    response = await world.http.post("/v1/completions", content=body, headers=headers)
    assert "an object has the key 'model' twice" in response.json()["error"]["message"]
    assert (await world.text(prompt='{"model": 1, "model": 2}')).status_code == 200


async def test_parameters_of_the_address_are_refused() -> None:
    """Bug: ?max_tokens=5 is accepted and ignored. Balancers and monitors may send what they like."""
    http = World(FakeEngine()).http
    for method, path in (("POST", "/v1/completions"), ("POST", "/tokenize"), ("GET", "/v1/models")):
        response = await http.request(method, f"{path}?foo=1", json={"model": "demo", "prompt": "x"})
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["code"]) == (400, "foo", "unknown_field"), path
    for path in ("/health", "/metrics", "/", "/docs"):
        assert (await http.get(f"{path}?foo=1")).status_code < 400, path


async def test_bodies_over_the_limit_are_refused_before_they_are_kept() -> None:
    """Bug: one request of 100 MB takes the memory and the time of all others."""
    taken = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal taken
        for _ in range(1000):
            taken += 1
            yield b" " * 100

    world = World(FakeEngine(), max_body_size=250)
    bodies: list[Any] = [b" " * 251, chunks()]  # with a content-length, and without
    for body in bodies:
        response = await world.http.post("/v1/completions", content=body)
        assert response.status_code == 413
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "body_too_large")
        assert "250 bytes" in error["message"]
        assert "--max-body-size" in error["message"]
    assert taken == 3


async def test_bodies_of_just_the_limit_are_taken() -> None:
    world = World(FakeEngine(), max_body_size=250)
    content = b'{"model": "demo", "prompt": "x"}'.ljust(250)
    response = await world.http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 200
