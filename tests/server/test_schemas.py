"""No field is accepted and ignored: it is honoured, without effect by nature, or refused by name."""

from collections.abc import Iterator
from typing import Any

import openai.types.chat.completion_create_params as openai_chat
import openai.types.completion_create_params as openai_text
import pytest
from pydantic import BaseModel, ValidationError

from server.schemas.chat import ChatRequest, Message
from server.schemas.common import StreamOptions
from server.schemas.completions import CompletionRequest
from tests.fakes import FakeEngine
from tests.server.conftest import World

pytestmark = pytest.mark.anyio

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "demo", "prompt": "hi"}
ROUTES: list[tuple[str, type[BaseModel], dict[str, Any]]] = [
    ("/v1/chat/completions", ChatRequest, CHAT),
    ("/v1/completions", CompletionRequest, TEXT),
]


def refused_fields(model: type[BaseModel]) -> Iterator[tuple[str, list[Any]]]:
    for name, field in model.model_fields.items():
        if isinstance(field.json_schema_extra, dict) and "refused" in field.json_schema_extra:
            neutral = field.json_schema_extra["refused"]
            assert isinstance(neutral, list)
            yield name, neutral


REFUSED = [(path, body, name, neutral) for path, model, body in ROUTES for name, neutral in refused_fields(model)]


@pytest.mark.parametrize(("path", "body", "name", "neutral"), REFUSED, ids=lambda value: str(value)[:24])
async def test_refused_field_gets_400_with_its_name(path: str, body: Any, name: str, neutral: list[Any]) -> None:
    """Bug: a client asks for JSON, tools or a suffix and gets plain text that looks like an answer."""
    world = World(FakeEngine())
    refusal = await world.post(path, body, **{name: {"x": 1}})
    assert refusal.status_code == 400
    error = refusal.json()["error"]
    assert (error["param"], error["code"]) == (name, "unsupported_field")
    for value in [None, *neutral]:
        assert (await world.post(path, body, **{name: value})).status_code == 200


@pytest.mark.parametrize(("path", "model", "body"), ROUTES)
async def test_unknown_field_gets_400_with_its_name(path: str, model: type[BaseModel], body: dict[str, Any]) -> None:
    response = await World(FakeEngine()).post(path, body, tempreature=1)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tempreature"


@pytest.mark.parametrize(
    ("params", "model"),
    [
        (openai_chat.CompletionCreateParamsBase, ChatRequest),
        (openai_text.CompletionCreateParamsBase, CompletionRequest),
    ],
)
def test_every_field_of_the_official_client_is_known(params: type, model: type[BaseModel]) -> None:
    """Bug: a field of OpenAI's is answered with "no such field" instead of what to do."""
    assert set(params.__annotations__) <= set(model.model_fields)


BAD_VALUES: list[tuple[str, Any]] = [
    ("temperature", -0.1),
    ("temperature", "hot"),
    ("top_p", 1.1),
    ("top_k", -2),
    ("min_p", 2),
    ("n", 0),
    ("n", 129),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0),
    ("repetition_penalty", 1e300),
    ("top_k", 10**30),
    ("stop", 3),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {"one": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"01": 1}),
    ("logit_bias", {"9" * 5000: 1}),
    ("stop", ["x"] * 17),
    ("stop", ""),
    ("stop", "x" * 513),
    ("stop_token_ids", [-1]),
    ("min_tokens", -1),
    ("seed", 2**63),
    ("seed", 1.5),
    ("max_tokens", -1),
    ("stream_options", {"include_usage": True}),
    ("service_tier", "flex"),
    ("echo", "yes"),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES, ids=str)
@pytest.mark.parametrize(("path", "model", "body"), ROUTES)
async def test_bad_value_gets_400_with_the_field(
    path: str, model: type[BaseModel], body: Any, name: str, value: Any
) -> None:
    response = await World(FakeEngine()).post(path, body, **{name: value})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(name)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": 21}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "x"]}, "prompt"),
        ({"prompt": ["x", [1]]}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": ["x"] * 129}, "prompt"),
    ],
)
def test_completion_fields(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ValidationError) as error:
        CompletionRequest.model_validate(TEXT | fields)
    assert error.value.errors()[0]["loc"] == (param,)


@pytest.mark.parametrize(
    ("fields", "loc"),
    [
        ({"messages": []}, ("messages",)),
        ({"messages": [{"role": "user"}]}, ("messages", 0, "content")),
        ({"messages": [{"role": "user", "content": {}}]}, ("messages", 0, "content")),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, ("messages", 0, "content", 0, "type")),
        ({"messages": [{"role": "robot", "content": "x"}]}, ("messages", 0, "role")),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, ("messages", 0, "tool_calls")),
        ({"max_tokens": 0}, ("max_tokens",)),
        ({"max_tokens": 3, "max_completion_tokens": 4}, ("max_completion_tokens",)),
        ({"top_logprobs": 2}, ("top_logprobs",)),
        ({"logprobs": True, "top_logprobs": 21}, ("top_logprobs",)),
        ({"add_generation_prompt": True, "continue_final_message": True}, ("continue_final_message",)),
        ({"chat_template_kwargs": {"tokenize": True}}, ("chat_template_kwargs",)),
    ],
)
def test_chat_fields(fields: dict[str, Any], loc: tuple[str | int, ...]) -> None:
    with pytest.raises(ValidationError) as error:
        ChatRequest.model_validate(CHAT | fields)
    assert error.value.errors()[0]["loc"] == loc


async def test_image_parts_are_refused_where_they_stand() -> None:
    """Bug: an image is dropped and the model answers as if it had seen one."""
    parts = [{"type": "text", "text": "what is this?"}, {"type": "image_url", "image_url": {"url": "data:"}}]
    response = await World(FakeEngine()).chat(messages=[{"role": "user", "content": parts}])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages[0].content[1].type"


def test_null_means_not_given() -> None:
    """Bug: clients that send null for every unset field are refused."""
    for model, body in ((ChatRequest, CHAT), (CompletionRequest, TEXT)):
        optional = {name: None for name, field in model.model_fields.items() if not field.is_required()}
        assert model.model_validate(body | optional).model_dump(exclude_none=True).keys() == body.keys()


def test_an_answer_can_be_sent_back_as_it_came() -> None:
    """Bug: `messages.append(response.choices[0].message)` is refused for its null fields."""
    answer: dict[str, Any] = {"role": "assistant", "content": "x", "refusal": None, "annotations": [], "audio": None}
    assert Message.model_validate(answer | {"function_call": None, "tool_calls": None}).text == "x"


def test_text_parts_are_joined() -> None:
    message = Message.model_validate({"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]})
    assert message.text == "a\nb"


def test_not_a_number_is_refused() -> None:
    """Bug: JSON's NaN passes every comparison and reaches the sampler."""
    with pytest.raises(ValidationError):
        CompletionRequest.model_validate(TEXT | {"temperature": float("nan")})
    with pytest.raises(ValidationError):
        StreamOptions.model_validate({"include_obfuscation": True})
