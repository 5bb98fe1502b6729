"""Every error leaves in OpenAI's shape."""

from collections.abc import Callable

import httpx
import openai
import pytest

from engine.client import EngineUnavailable
from engine.messages import Failed, Submit
from server.errors import field_path
from tests.fakes import FakeEngine, Script
from tests.server.conftest import World

pytestmark = pytest.mark.anyio


def failing(kind: str, tokens: bytes = b"") -> FakeEngine:
    def script(submit: Submit) -> Script:
        return Script(list(tokens), failure=Failed(submit.id, kind, "told so"))  # type: ignore[arg-type]

    return FakeEngine(script)


def error_of(response: httpx.Response) -> dict[str, str | None]:
    error: dict[str, str | None] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("loc", "path"),
    [(("messages", 0, "content"), "messages[0].content"), (("stop",), "stop"), (("a", "b", 2), "a.b[2]")],
)
async def test_field_paths(loc: tuple[int | str, ...], path: str) -> None:
    assert field_path(loc) == path


async def test_openai_client_raises_its_own_exceptions() -> None:
    """Bug: a body that the official client cannot read becomes an error without code or param."""
    client = World(FakeEngine()).openai
    with pytest.raises(openai.NotFoundError) as missing:
        await client.completions.create(model="other", prompt="x")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="temperature: must be at most 2") as bad:
        await client.completions.create(model="demo", prompt="x", temperature=3)
    assert (bad.value.type, bad.value.param, bad.value.code) == (
        "invalid_request_error",
        "temperature",
        "invalid_value",
    )
    with pytest.raises(openai.BadRequestError) as nested:
        await client.chat.completions.create(
            model="demo", messages=[{"role": "tool", "content": "x", "tool_call_id": "1"}]
        )
    assert nested.value.param is not None
    assert nested.value.param.startswith("messages[0].")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"max_token": 5}, "max_token: there is no such field here; did you mean max_tokens?"),
        ({"messages": [{"rol": "user"}]}, "messages[0].role: this field is required"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "txt": "y"}]}]},
            "messages[0].content[0].txt: there is no such field here; did you mean text?",
        ),
        ({"qqqq": 5}, "qqqq: there is no such field here"),
        ({"messages": []}, "messages: must have at least 1 item, found 0"),
        ({"messages": ["hi"]}, "messages[0]: must be an object"),
        ({"n": 1.5}, "n: must be a whole number"),
        ({"n": "1"}, "n: must be a whole number"),
        ({"n": 0}, "n: must be at least 1"),
        ({"stream": 1}, "stream: must be true or false"),
        ({"top_k": 2**63}, f"top_k: must be less than {2**63}"),
        ({"kv_policy": "k" * 201}, "kv_policy: must have at most 200 characters"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role: must be 'system', 'developer', "),
    ],
)
async def test_what_is_wrong_is_said_in_words_of_json(body: dict[str, object], message: str) -> None:
    """Bug: "List should have at least 1 item after validation, not 0", and misspelt fields to be looked up."""
    response = await World(FakeEngine()).chat(**body)
    assert response.status_code == 400
    assert str(error_of(response)["message"]).startswith(message)


async def test_an_empty_body_is_called_empty() -> None:
    """Bug: "(Field required)", when the field is the body."""
    response = await World(FakeEngine()).http.post("/v1/completions")
    expected = "The body must be a JSON object with Content-Type: application/json; it is empty"
    assert error_of(response)["message"] == expected


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [("GET", "/nope", 404, "route_not_found"), ("GET", "/v1/completions", 405, "method_not_allowed")],
)
async def test_routers_own_errors_have_the_same_shape(method: str, path: str, status: int, code: str) -> None:
    response = await World(FakeEngine()).http.request(method, path)
    assert response.status_code == status
    assert path in str(error_of(response)["message"])
    assert error_of(response)["code"] == code


@pytest.mark.parametrize(("kind", "status"), [("invalid", 400), ("capacity", 400), ("engine", 500)])
async def test_engine_failures_have_a_status(kind: str, status: int) -> None:
    response = await World(failing(kind)).text()
    assert response.status_code == status
    assert error_of(response)["message"] == "told so"


@pytest.mark.parametrize("stream", [False, True])
async def test_engine_that_takes_no_requests_gives_503(stream: bool) -> None:
    """Bug: a stream that answers 200 and then nothing while the engine restarts."""
    world = World(FakeEngine(state="restarting"))
    response = await world.text(stream=stream)
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1


@pytest.mark.parametrize("stream", [False, True])
async def test_engine_that_goes_down_at_submit_gives_503(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    world = World(engine)
    monkeypatch.setattr(engine, "submit", raising(EngineUnavailable("gone", 2.4)))
    response = await world.chat(stream=stream)
    assert (response.status_code, response.headers["retry-after"]) == (503, "3")
    assert world.service.in_flight == 0


async def test_unexpected_errors_tell_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a traceback, or the text of an internal exception, in the answer."""
    engine = FakeEngine()
    monkeypatch.setattr(engine, "submit", raising(RuntimeError("secret")))
    response = await World(engine).text()
    assert response.status_code == 500
    assert "secret" not in response.text
    assert error_of(response)["code"] == "internal_error"


def raising(error: Exception) -> Callable[[Submit], None]:
    def submit(request: Submit) -> None:
        raise error

    return submit
