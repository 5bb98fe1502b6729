"""Defaults and limits: what the engine is asked, and what it is never asked."""

from typing import Any

import msgspec
import pytest

from engine.messages import PlanSummary, Sampling
from server.admission import Job, Limits, check_length, jobs
from server.errors import ContextTooLong, InvalidRequest
from server.schemas.completions import CompletionRequest
from tests.fakes import EOS, PLAN, VOCAB_SIZE, ByteTokenizer

REST = Limits(max_tokens=None, default_max_tokens=None)


def admit(prompt: list[int], limits: Limits = REST, plan: PlanSummary = PLAN, **fields: Any) -> Job:
    request = CompletionRequest.model_validate({"model": "demo", "prompt": "x"} | fields)
    [job] = jobs(request, [prompt], limits, plan)
    return job


def test_neutral_request_has_the_engines_neutral_sampling() -> None:
    """Bug: a default of the server's switches a sampling rule on."""
    assert admit([1]).submit.sampling == Sampling(max_tokens=PLAN.max_model_len - 1)


def test_every_field_reaches_the_engine() -> None:
    """Bug: a sampling field is accepted and ignored."""
    fields: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
        "seed": 4,
        "min_tokens": 2,
        "ignore_eos": True,
    }
    job = admit(
        [1],
        Limits(8, None, 3, 4),
        logit_bias={"5": -100},
        stop_token_ids=[9],
        n=2,
        priority=-1,
        kv_policy="k4v4:w512",
        **fields,
    )
    expected = Sampling(
        max_tokens=8, logit_bias={5: -100.0}, stop_token_ids=(9,), num_logprobs=3, num_prompt_logprobs=4, **fields
    )
    assert job.submit.sampling == expected
    assert (job.submit.n, job.submit.priority, job.submit.kv_policy) == (2, -1, "k4v4:w512")
    assert job.end_tokens >= {EOS, 9}


def test_zero_top_p_keeps_one_token_and_minus_one_keeps_all() -> None:
    sampling = admit([1], top_p=0, top_k=-1).submit.sampling
    assert 0 < sampling.top_p < 1e-6
    assert sampling.top_k == 0


@pytest.mark.parametrize("end", [0, 1], ids=["least", "most"])
def test_what_the_schema_allows_the_engine_takes(end: int) -> None:
    """Bug: a limit of the engine's tighter than the API's: 500 in place of an answer."""
    limits: dict[str, tuple[Any, Any]] = {
        "temperature": (0, 2),
        "top_p": (0, 1),
        "top_k": (-1, 2**63 - 1),
        "min_p": (0, 1),
        "presence_penalty": (-2, 2),
        "frequency_penalty": (-2, 2),
        "repetition_penalty": (0.01, 100),
        "logit_bias": ({"0": -100}, {str(VOCAB_SIZE - 1): 100}),
        "seed": (-(2**63), 2**63 - 1),
        "stop_token_ids": ([0], [VOCAB_SIZE - 1]),
        "min_tokens": (0, 8),
    }
    sampling = admit([1], Limits(8, None, 0, 0), **{name: ends[end] for name, ends in limits.items()}).submit.sampling
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sampling), type=Sampling) == sampling


def test_defaults_shrink_to_the_room_left() -> None:
    """Bug: a prompt that leaves 3 tokens of context is refused because the default of 16 does not fit."""
    room = 3
    prompt = [1] * (PLAN.max_model_len - room)
    assert admit(prompt, Limits(None, 16)).submit.sampling.max_tokens == room
    assert admit([1], Limits(None, 16)).submit.sampling.max_tokens == 16
    assert admit([1] * PLAN.max_model_len, Limits(0, 16)).submit.sampling.max_tokens == 0


def test_an_answer_of_open_length_ends_where_float16_does() -> None:
    """Bug: a chat in f16 that is refused because it might use the whole context."""
    plan = msgspec.structs.replace(PLAN, kv_policy="k4v4", kv_request_window=100)
    for limits, num_tokens in ((Limits(None, None), 10), (Limits(None, 4), 4), (Limits(50, None), 50)):
        job = admit([1] * 90, limits, plan, kv_policy="f16")
        assert job.submit.sampling.max_tokens == num_tokens
    job = admit([1] * 90, kv_policy="f16")  # a server that keeps f16 for all
    assert job.submit.sampling.max_tokens == PLAN.max_model_len - 90


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "param"), [(500, 13, "max_tokens"), (512, None, "prompt"), (600, 1, "prompt")]
)
def test_too_long_names_the_numbers_and_what_to_lower(num_prompt: int, max_tokens: int | None, param: str) -> None:
    with pytest.raises(ContextTooLong, match=rf"{num_prompt} tokens.*512 tokens") as error:
        admit([1] * num_prompt, Limits(max_tokens, None))
    assert (error.value.param, error.value.code) == (param, "context_length_exceeded")


def test_texts_that_cannot_fit_are_refused_without_tokenizing() -> None:
    """Bug: minutes of tokenizing for a prompt whose length alone says that it is too long."""
    check_length("x" * PLAN.max_model_len, ByteTokenizer(), PLAN, "messages")
    with pytest.raises(ContextTooLong, match=r"5120 characters.*512 tokens \(--max-model-len\)") as error:
        check_length("x" * 5120, ByteTokenizer(), PLAN, "messages")
    assert (error.value.param, error.value.code) == ("messages", "context_length_exceeded")


def test_context_that_the_cache_limits_blames_the_cache_too() -> None:
    """Bug: a user raises --max-model-len, which was never what limited them."""
    plan = msgspec.structs.replace(PLAN, num_pages=PLAN.max_model_len // PLAN.page_size)
    with pytest.raises(ContextTooLong, match="--kv-memory"):
        admit([1] * 600, plan=plan)


def test_more_than_the_cache_holds_is_refused() -> None:
    """Bug: a request that can never get its pages waits for ever."""
    plan = msgspec.structs.replace(PLAN, num_pages=4)
    with pytest.raises(ContextTooLong, match="holds 64 tokens"):
        admit([1] * 60, Limits(5, None), plan)
    assert admit([1] * 60, plan=plan).submit.sampling.max_tokens == 4


@pytest.mark.parametrize(
    ("prompt", "fields", "param"),
    [
        ([], {}, "prompt"),
        ([VOCAB_SIZE], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([1], {"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias"),
        ([1], {"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
        ([1], {"min_tokens": 512}, "min_tokens"),
    ],
)
def test_what_the_model_cannot_do_is_refused(prompt: list[int], fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        admit(prompt, **fields)
    assert error.value.param == param
