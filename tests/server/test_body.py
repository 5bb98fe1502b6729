"""Bodies that are not what they should be."""

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
