"""From a valid request to what the engine is asked: defaults filled in, and nothing sent that can never fit."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.messages import PlanSummary, Sampling, Submit
from server.errors import ContextTooLong, InvalidRequest
from server.schemas.common import SamplingFields
from server.tokenizer import Tokenizer

SMALLEST_TOP_P = 1e-9  # 0 means "the likeliest token only", and so does this


@dataclass(frozen=True)
class Limits:
    """What one kind of request asks for beyond the sampling fields."""

    max_tokens: int | None  # None: `default_max_tokens`, or what is left of the context if that is less
    default_max_tokens: int | None  # None: what is left of the context
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    prompt_field: str = "prompt"  # what errors about the prompt name


@dataclass(frozen=True)
class Job:
    """One prompt on its way through the engine, and how its answers become text."""

    submit: Submit
    stop: tuple[str, ...] = ()
    keep_stop: bool = False
    skip_special_tokens: bool = True
    end_tokens: frozenset[int] = frozenset()  # a token of these may turn out to end the answer


def jobs(request: SamplingFields, prompts: Sequence[list[int]], limits: Limits, plan: PlanSummary) -> list[Job]:
    """One job for each prompt. Raises InvalidRequest or ContextTooLong."""
    _check_token_ids(request, plan)
    arrival = time.monotonic()
    return [_job(request, prompt, limits, plan, arrival) for prompt in prompts]


def _job(request: SamplingFields, prompt: list[int], limits: Limits, plan: PlanSummary, arrival: float) -> Job:
    if request.kv_policy == "f16" and plan.kv_request_window:
        limits = _within_float16(len(prompt), limits, plan)
    max_tokens = _max_tokens(len(prompt), limits, plan)  # before anything looks at every token
    check_ids(prompt, plan.vocab_size, limits.prompt_field)
    if not prompt:
        raise InvalidRequest("The prompt is empty: this model needs at least one token", param=limits.prompt_field)
    if (request.min_tokens or 0) > max_tokens:
        raise InvalidRequest(f"min_tokens: {request.min_tokens} exceeds the {max_tokens} allowed", param="min_tokens")
    submit = Submit(
        id=uuid.uuid4().hex,
        prompt=prompt,
        sampling=_sampling(request, max_tokens, limits),
        arrival=arrival,
        n=request.n or 1,
        priority=request.priority or 0,
        kv_policy=request.kv_policy,
    )
    return Job(
        submit=submit,
        stop=tuple(request.stop or ()),
        keep_stop=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
        end_tokens=frozenset(plan.eos_token_ids) | frozenset(request.stop_token_ids or ()),
    )


def _within_float16(num_prompt: int, limits: Limits, plan: PlanSummary) -> Limits:
    """An answer whose length the request leaves open ends where float16 does."""
    room = max(1, plan.kv_request_window - num_prompt)
    default = limits.default_max_tokens
    return replace(limits, default_max_tokens=room if default is None else min(default, room))


def _max_tokens(num_prompt: int, limits: Limits, plan: PlanSummary) -> int:
    """Tokens the answer may have. Raises ContextTooLong when prompt and answer do not fit."""
    capacity = plan.num_pages * plan.page_size
    room = min(plan.max_model_len, capacity) - num_prompt
    if limits.max_tokens is None:
        wanted = max(room, 1) if limits.default_max_tokens is None else max(1, min(limits.default_max_tokens, room))
    else:
        wanted = limits.max_tokens
    if wanted <= room:
        return wanted
    if num_prompt + wanted > plan.max_model_len:
        limit = context_limit(plan)
    else:
        limit = f"its KV cache holds {capacity} tokens (--kv-memory)"
    advice = "Lower max_tokens or shorten the prompt" if room > 0 else "Shorten the prompt"
    raise ContextTooLong(
        f"The prompt has {num_prompt} tokens and the answer may have {wanted}: {num_prompt + wanted} together, "
        f"but {limit}. {advice}.",
        param="max_tokens" if room > 0 else limits.prompt_field,
    )


def context_limit(plan: PlanSummary) -> str:
    """The longest request, and the settings that decide it."""
    by_cache = plan.max_model_len == plan.num_pages * plan.page_size  # the engine lowers it to what the cache holds
    settings = "--max-model-len, and --kv-memory, whose cache holds no more" if by_cache else "--max-model-len"
    return f"this server allows {plan.max_model_len} tokens ({settings})"


def check_length(text: str, tokenizer: Tokenizer, plan: PlanSummary, param: str) -> None:
    """Raises ContextTooLong for a text that no tokenizing could make fit, which would take its time to find out."""
    at_least = len(text) // tokenizer.max_token_bytes
    if at_least > plan.max_model_len:
        raise ContextTooLong(
            f"The prompt has {len(text)} characters, which are at least {at_least} tokens, "
            f"but {context_limit(plan)}. Shorten the prompt.",
            param=param,
        )


def _sampling(request: SamplingFields, max_tokens: int, limits: Limits) -> Sampling:
    """The engine's sampling rules; null fields take the defaults."""
    temperature, top_p, repetition = request.temperature, request.top_p, request.repetition_penalty
    return Sampling(
        max_tokens=max_tokens,
        temperature=1.0 if temperature is None else temperature,
        top_p=1.0 if top_p is None else max(top_p, SMALLEST_TOP_P),
        top_k=max(request.top_k or 0, 0),
        min_p=request.min_p or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=1.0 if repetition is None else repetition,
        logit_bias={int(token): bias for token, bias in (request.logit_bias or {}).items()},
        seed=request.seed,
        min_tokens=request.min_tokens or 0,
        stop_token_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=bool(request.ignore_eos),
        num_logprobs=limits.num_logprobs,
        num_prompt_logprobs=limits.num_prompt_logprobs,
    )


def _check_token_ids(request: SamplingFields, plan: PlanSummary) -> None:
    check_ids([int(token) for token in request.logit_bias or {}], plan.vocab_size, "logit_bias")
    check_ids(request.stop_token_ids or [], plan.vocab_size, "stop_token_ids")


def check_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises InvalidRequest naming the first id that is no token of the model."""
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        bad = next(token for token in ids if not 0 <= token < vocab_size)
        raise InvalidRequest(f"{param}: token id {bad} is not in the vocabulary of {vocab_size} tokens", param=param)
