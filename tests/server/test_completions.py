"""Texts to continue: batches, echo, log-probabilities, streamed or not."""

import math
from typing import Any

import msgspec
import pytest

from engine.messages import Failed, Logprobs
from server.routes.chat import finite
from server.routes.completions import token_text
from tests.fakes import BOS, PLAN, ByteTokenizer, FakeEngine, Script, say
from tests.server.conftest import TEXT, World, events

pytestmark = pytest.mark.anyio


def world(text: str = "ab é") -> World:
    return World(FakeEngine(lambda submit: say(text)))


async def test_official_client_gets_text_and_usage() -> None:
    answer = await world().openai.completions.create(**TEXT)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("ab é", "stop")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 6)


async def test_sixteen_tokens_by_default() -> None:
    engine = FakeEngine(lambda submit: say("x" * 40))
    answer = await World(engine).post("/v1/completions", {"model": "demo", "prompt": "hi"})
    assert answer.json()["choices"][0]["text"] == "x" * 16
    assert answer.json()["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("hi", [[BOS, 104, 105]]),
        (["h", "i"], [[BOS, 104], [BOS, 105]]),
        ([104, 105], [[104, 105]]),
        ([[104], [105]], [[104], [105]]),
        ("", [[BOS]]),
    ],
)
async def test_prompts_in_all_four_forms(prompt: Any, ids: list[list[int]]) -> None:
    engine = FakeEngine()
    response = await World(engine).text(prompt=prompt)
    assert response.status_code == 200
    assert [submit.prompt for submit in engine.submitted] == ids


async def test_bos_can_be_left_out() -> None:
    engine = FakeEngine()
    await World(engine).text(add_special_tokens=False)
    assert engine.submitted[0].prompt == [104, 105]


async def test_choices_of_a_batch_are_numbered_prompt_by_prompt() -> None:
    engine = FakeEngine(lambda submit: say(f"to {chr(submit.prompt[-1])}"))
    answer = await World(engine).openai.completions.create(model="demo", prompt=["p", "q"], n=2, max_tokens=9)
    assert [(choice.index, choice.text) for choice in answer.choices] == [
        (0, "to p"),
        (1, "to p"),
        (2, "to q"),
        (3, "to q"),
    ]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 20)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 2  # choices share a prompt; that is no cache hit


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 2, "prompt": ["p", "qü"], "echo": True},
        {"stop": "b "},
        {"logprobs": 2},
        {"logprobs": 0, "echo": True, "n": 2},
        {"logprobs": 1, "echo": True, "max_tokens": 0},
        {"max_tokens": 4, "logprobs": 1},
    ],
    ids=str,
)
async def test_stream_says_the_same_as_one_answer(fields: dict[str, Any]) -> None:
    """Bug: two code paths, two answers."""
    client = world()
    whole = (await client.text(**fields)).json()
    *chunks, usage, end = events(await client.text(**fields, stream=True, stream_options={"include_usage": True}))
    assert end == "[DONE]"
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
    for expected in whole["choices"]:
        pieces = [c for chunk in chunks for c in chunk["choices"] if c["index"] == expected["index"]]
        assert "".join(piece["text"] for piece in pieces) == expected["text"]
        assert [piece["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + [expected["finish_reason"]]
        if expected["logprobs"] is not None:
            for key, values in expected["logprobs"].items():
                assert [entry for piece in pieces for entry in piece["logprobs"][key]] == values


async def test_logprobs_are_parallel_lists_with_offsets() -> None:
    """Bug: offsets in bytes or tokens, or counted from the answer when the prompt is echoed."""
    answer = await world("éb").text(logprobs=1, echo=True)
    logprobs = answer.json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["<s>", "h", "i", "bytes:\\xc3", "bytes:\\xa9", "b"]
    assert logprobs["text_offset"] == [0, 0, 1, 2, 2, 3]
    assert logprobs["token_logprobs"] == [None, -0.5, -0.5, -0.5, -0.5, -0.5]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][1] == {"h": -0.5}
    assert answer.json()["choices"][0]["text"] == "hiéb"


async def test_prompt_can_be_scored_without_an_answer() -> None:
    """Bug: scoring harnesses (echo, logprobs, max_tokens 0) are refused or get a token they did not ask for."""
    engine = FakeEngine()
    answer = await World(engine).openai.completions.create(
        model="demo", prompt="hey", max_tokens=0, echo=True, logprobs=1
    )
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason) == ("hey", "length")
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == [None, -0.5, -0.5, -0.5]
    sampling = engine.submitted[0].sampling
    assert (sampling.max_tokens, sampling.num_prompt_logprobs) == (0, 1)


async def test_chosen_token_is_always_among_the_scored() -> None:
    answer = await world("a").text(logprobs=0)
    assert answer.json()["choices"][0]["logprobs"]["top_logprobs"] == [{"a": -0.5}]


def test_impossible_tokens_have_a_number() -> None:
    """Bug: -Infinity in the body, which is not JSON."""
    assert finite(-math.inf) == -9999.0
    assert finite(Logprobs(1, -1.5).logprob) == -1.5


def test_tokens_are_named_apart() -> None:
    """Bug: two halves of different characters share one key and overwrite each other."""
    assert token_text(0xC3, ByteTokenizer()) != token_text(0xA9, ByteTokenizer())


@pytest.mark.parametrize("stream", [False, True])
async def test_precision_that_is_not_given_is_400(stream: bool) -> None:
    """Bug: a refusal that comes when the status is out, in a stream that began as if all were well."""
    refusal = Script(failure=Failed("", "invalid", "kv_policy: not on offer", "kv_policy"))
    server = World(FakeEngine(lambda submit: refusal if submit.kv_policy == "f16" else say("yes")))
    response = await server.text(stream=stream, kv_policy="f16")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "kv_policy")
    assert server.service.in_flight == 0
    response = await server.text(stream=stream, kv_policy="k4v4:w512")
    assert response.status_code == 200
    chunks = events(response)[:-1] if stream else [response.json()]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "yes"


async def test_too_long_gives_openais_code() -> None:
    world = World(FakeEngine(plan=msgspec.structs.replace(PLAN, max_model_len=20)))
    response = await world.text(prompt="x" * 10, max_tokens=11)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "max_tokens")
    assert "--max-model-len" in error["message"]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "ab."),
        ({"skip_special_tokens": False}, "a<s>b."),
        ({"stop": "b", "include_stop_str_in_output": True}, "ab"),
        ({"stop_token_ids": [98]}, "a"),
        ({"stop_token_ids": [98], "include_stop_str_in_output": True}, "ab"),
    ],
    ids=str,
)
async def test_what_belongs_to_the_answer(fields: dict[str, Any], text: str) -> None:
    """Bug: a field about the end of the answer is accepted and ignored."""
    world = World(FakeEngine(lambda submit: Script([97, BOS, 98, 46, 257])))
    assert (await world.text(**fields)).json()["choices"][0]["text"] == text


async def test_end_token_may_be_shown() -> None:
    world = World(FakeEngine(lambda submit: say("a")))
    answer = await world.text(skip_special_tokens=False, include_stop_str_in_output=True)
    assert answer.json()["choices"][0]["text"] == "a</s>"
