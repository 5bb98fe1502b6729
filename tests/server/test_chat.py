"""Conversations: the template, the answer in OpenAI's format, streamed or not."""

from pathlib import Path
from typing import Any

import pytest

from server.tokenizer import TemplateError
from tests.fakes import ByteTokenizer, FakeEngine, Script, say
from tests.server.conftest import CHAT, World, events

pytestmark = pytest.mark.anyio


def world(text: str = "Grüße 🎉!") -> World:
    return World(FakeEngine(lambda submit: say(text)))


async def test_official_client_gets_the_whole_answer() -> None:
    answer = await world().openai.chat.completions.create(**CHAT)
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "Grüße 🎉!", "stop")
    assert answer.usage is not None
    prompt = len("user: hi\nassistant:")
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": prompt,
        "completion_tokens": len("Grüße 🎉!".encode()) + 1,
        "total_tokens": prompt + len("Grüße 🎉!".encode()) + 1,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


@pytest.mark.parametrize(
    "fields",
    [{}, {"n": 3}, {"stop": ["🎉", "zz"]}, {"max_tokens": 5}, {"logprobs": True, "top_logprobs": 2}],
    ids=str,
)
async def test_stream_says_the_same_as_one_answer(fields: dict[str, Any]) -> None:
    """Bug: two code paths, two answers."""
    client = world().openai
    whole = await client.chat.completions.create(**CHAT, **fields)
    n = fields.get("n", 1)
    texts, reasons, roles = [""] * n, [""] * n, [0] * n
    scored: list[list[Any]] = [[] for _ in range(n)]
    streaming: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    stream: Any = await client.chat.completions.create(**CHAT, **fields, **streaming)
    usage = None
    async for chunk in stream:
        assert usage is None, "the usage chunk is the last"
        usage = chunk.usage
        assert bool(chunk.choices) != bool(usage)
        for choice in chunk.choices:
            roles[choice.index] += choice.delta.role == "assistant"
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            scored[choice.index] += choice.logprobs.content if choice.logprobs else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert scored == [(choice.logprobs.content if choice.logprobs else []) for choice in whole.choices]
    assert roles == [1] * n
    assert usage == whole.usage


async def test_first_chunk_carries_the_role_and_the_last_event_is_done() -> None:
    first, *rest = events(await world("a").chat(stream=True))
    assert first["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert [chunk["choices"][0]["delta"] for chunk in rest[:-1]] == [{"content": "a"}, {}]
    assert "usage" not in first
    assert rest[-2]["choices"][0]["finish_reason"] == "stop"
    assert rest[-1] == "[DONE]"


async def test_logprobs_give_token_bytes_and_likeliest() -> None:
    """Bug: bytes that do not add up to the text, so clients cannot reassemble split characters."""
    answer = await world("é").openai.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert b"".join(bytes(entry.bytes or []) for entry in logprobs.content).decode() == "é"
    assert [top.logprob for top in logprobs.content[0].top_logprobs] == [-0.5, -1.5]
    assert logprobs.content[0].token == "\N{REPLACEMENT CHARACTER}"


async def test_answer_may_use_the_rest_of_the_context() -> None:
    engine = FakeEngine()
    await World(engine).chat()
    prompt = len("user: hi\nassistant:")
    assert engine.submitted[0].sampling.max_tokens == engine.plan.max_model_len - prompt
    await World(engine).chat(max_completion_tokens=7)
    assert engine.submitted[1].sampling.max_tokens == 7


async def test_template_writes_special_tokens_itself() -> None:
    """Bug: two BOS tokens, one from the template and one from the tokenizer."""
    engine = FakeEngine()
    await World(engine).chat()
    assert engine.submitted[0].prompt == list(b"user: hi\nassistant:")


async def test_developer_is_system_and_the_last_message_can_be_continued() -> None:
    """Bug: instructions in a role the template does not know are dropped without a word."""
    engine = FakeEngine()
    messages = [{"role": "developer", "content": "be brief"}, {"role": "assistant", "content": "I"}]
    await World(engine).chat(messages=messages, continue_final_message=True)
    assert bytes(engine.submitted[0].prompt) == b"system: be brief\nassistant: I\n"


async def test_template_errors_are_the_callers_to_read() -> None:
    class Picky(ByteTokenizer):
        def render(self, messages: Any, **options: Any) -> str:
            raise TemplateError("The chat template refused the messages: roles must alternate")

    response = await World(FakeEngine(), Picky()).chat()
    assert response.status_code == 400
    assert "roles must alternate" in response.json()["error"]["message"]


async def test_model_without_template_says_what_to_do() -> None:
    response = await World(FakeEngine(), ByteTokenizer(has_chat_template=False)).chat()
    assert response.status_code == 400
    assert "/v1/completions" in response.json()["error"]["message"]
    assert "--chat-template" in response.json()["error"]["message"]


async def test_template_variables_reach_the_template(tmp_path: Path) -> None:
    """Bug: chat_template_kwargs accepted and ignored."""
    seen = {}

    class Curious(ByteTokenizer):
        def render(self, messages: Any, **options: Any) -> str:
            seen.update(options)
            return "x"

    await World(FakeEngine(), Curious()).chat(chat_template_kwargs={"enable_thinking": False})
    assert seen == {"enable_thinking": False, "add_generation_prompt": True, "continue_final_message": False}


async def test_empty_answer_is_an_empty_string() -> None:
    answer = await World(FakeEngine(lambda submit: Script([257]))).openai.chat.completions.create(**CHAT)
    assert answer.choices[0].message.content == ""


@pytest.mark.parametrize("text", ["é" * 300, "x" * 5000], ids=["once tokenized", "before"])
async def test_long_conversations_are_refused_by_the_name_of_their_field(text: str) -> None:
    """Bug: an error about `prompt`, which a chat request does not have."""
    response = await World(FakeEngine()).chat(messages=[{"role": "user", "content": text}])
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


async def test_names_of_speakers_reach_the_template() -> None:
    """Bug: message.name accepted and ignored."""
    seen = []

    class Curious(ByteTokenizer):
        def render(self, messages: Any, **options: Any) -> str:
            seen.append(messages)
            return str(messages)

    await World(FakeEngine(), Curious()).chat(messages=[{"role": "user", "name": "Ann", "content": "hi"}])
    assert seen[0] == [{"role": "user", "name": "Ann", "content": "hi"}]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [{"role": "user", "name": "Ann", "content": "hi"}]}, "messages[0].name"),
        ({"chat_template_kwargs": {"enable_thinkin": False}}, "chat_template_kwargs.enable_thinkin"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tokenizer": 1}}, "chat_template_kwargs"),
        ({"continue_final_message": True}, "continue_final_message"),
    ],
)
async def test_what_the_template_cannot_honour_is_refused(fields: dict[str, Any], param: str) -> None:
    """Bug: a field the template never looks at is accepted, and so ignored; or a user's turn is "continued"."""
    response = await World(FakeEngine()).chat(**fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
