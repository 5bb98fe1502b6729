"""The URL table: models, tokens, health, documentation."""

import subprocess
import sys
import threading
from typing import Any

import pytest

from engine.client import EngineState
from tests.fakes import BOS, PLAN, VOCAB_SIZE, ByteTokenizer, FakeEngine
from tests.server.conftest import World

pytestmark = pytest.mark.anyio


async def test_models_are_listed_and_found() -> None:
    world = World(FakeEngine())
    listed = await world.openai.models.list()
    assert [model.id for model in listed.data] == ["demo"]
    found = (await world.http.get("/v1/models/demo")).json()
    assert (found["format"], found["max_model_len"], found["kv_policy"]) == (PLAN.format, PLAN.max_model_len, "f16")
    assert (await world.http.get("/v1/models/org/other")).status_code == 404


async def test_models_are_listed_while_loading() -> None:
    found = (await World(FakeEngine(state="starting")).http.get("/v1/models")).json()["data"][0]
    assert (found["id"], found["format"]) == ("demo", None)


@pytest.mark.parametrize(
    ("state", "health", "ready"),
    [("starting", 200, 503), ("ready", 200, 200), ("restarting", 200, 503), ("failed", 503, 503)],
)
async def test_alive_and_ready_are_two_questions(state: EngineState, health: int, ready: int) -> None:
    """Bug: an orchestrator kills a server that is loading, or sends traffic to one that is."""
    world = World(FakeEngine(state=state))
    assert (await world.http.get("/health")).status_code == health
    response = await world.http.get("/ready")
    assert response.status_code == ready
    assert ("retry-after" in response.headers) == (ready == 503)


async def test_draining_server_is_alive_and_not_ready() -> None:
    world = World(FakeEngine())
    world.service.draining = True
    assert (await world.http.get("/health")).status_code == 200
    for response in (await world.http.get("/ready"), await world.chat(), await world.text(stream=True)):
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        assert "shutting down" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/metrics", "/v1/models", "/v1/models/demo"])
async def test_what_can_be_got_can_be_asked_for_its_head(path: str) -> None:
    """Bug: a probe that sends HEAD, as many do, takes a healthy server out of service."""
    assert (await World(FakeEngine()).http.head(path)).status_code == 200


async def test_root_says_what_this_is() -> None:
    """Bug: the address the start screen prints answers 404 in a browser."""
    answer = (await World(FakeEngine()).http.get("/")).json()
    assert (answer["model"], answer["docs"], answer["openapi"]) == ("demo", "/docs", "/openapi.json")


async def test_text_to_tokens_and_back() -> None:
    http = World(FakeEngine()).http
    answer = (await http.post("/tokenize", json={"prompt": "hé", "return_token_strs": True})).json()
    assert answer == {
        "tokens": [BOS, 104, 0xC3, 0xA9],
        "count": 4,
        "max_model_len": PLAN.max_model_len,
        "token_strs": ["<s>", "h", "bytes:\\xc3", "bytes:\\xa9"],
    }
    back = await http.post("/detokenize", json={"tokens": answer["tokens"], "skip_special_tokens": True})
    assert back.json() == {"prompt": "hé"}


async def test_conversation_is_tokenized_as_chat_would() -> None:
    """Bug: counts that differ from what a request then uses."""
    world = World(FakeEngine())
    messages = [{"role": "user", "content": "hi"}]
    counted = (await world.http.post("/tokenize", json={"messages": messages})).json()
    await world.chat(messages=messages)
    assert counted["tokens"] == world.engine.submitted[0].prompt


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}),
        ("/tokenize", {"prompt": "x", "nope": 1}),
        ("/detokenize", {"tokens": ["x"]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [VOCAB_SIZE]}),
        ("/detokenize", {"tokens": [10**30]}),
    ],
)
async def test_bad_token_requests(path: str, body: dict[str, Any]) -> None:
    response = await World(FakeEngine()).http.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"model": "demo", "messages": [{"role": "user", "content": ""}] * 200}),
        ("/v1/completions", {"model": "demo", "prompt": "x" * 5000}),
        ("/tokenize", {"messages": [{"role": "user", "content": ""}] * 200}),
        ("/detokenize", {"tokens": [65] * 5000}),
    ],
)
async def test_big_bodies_are_worked_on_off_the_event_loop(path: str, body: dict[str, Any]) -> None:
    """Bug: every stream stands still while one long text, or one of very many parts, becomes tokens."""
    threads = set()

    class Watched(ByteTokenizer):
        def render(self, messages: Any, **options: Any) -> str:
            threads.add(threading.current_thread())
            return super().render(messages, **options)

        def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
            threads.add(threading.current_thread())
            return super().decode(ids, skip_special_tokens)

        @property
        def max_token_bytes(self) -> int:
            threads.add(threading.current_thread())
            return 1

    await World(FakeEngine(), Watched()).http.post(path, json=body)
    assert threads
    assert threading.current_thread() not in threads


async def test_texts_beyond_any_context_are_not_counted() -> None:
    """Bug: gigabytes and half a minute for the token count of a text no request could carry."""
    response = await World(FakeEngine()).http.post("/tokenize", json={"prompt": "x" * 5120})
    assert response.json()["error"]["code"] == "context_length_exceeded"


async def test_conversation_needs_a_template_to_be_tokenized() -> None:
    world = World(FakeEngine(), ByteTokenizer(has_chat_template=False))
    response = await world.http.post("/tokenize", json={"messages": [{"role": "user", "content": "x"}]})
    assert response.json()["error"]["code"] == "no_chat_template"


async def test_every_route_is_documented() -> None:
    http = World(FakeEngine()).http
    assert (await http.get("/docs")).status_code == 200
    schema = (await http.get("/openapi.json")).json()
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            assert operation["summary"], path
            assert operation["description"], path
    fields = schema["components"]["schemas"]["ChatRequest"]["properties"]
    assert all(field.get("description") for field in fields.values())


def test_server_process_does_not_import_torch() -> None:
    """Bug: 260 MiB and two seconds for a library the front end never calls."""
    code = (
        "import sys, server.cli, server.serving; from transformers import PreTrainedTokenizerFast;"
        "sys.exit('torch' in sys.modules or 'kernels' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
