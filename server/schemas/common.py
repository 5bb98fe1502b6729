"""What all requests share: the rule that no field is ignored, and the sampling fields.

A field is one of three things, and says which (docs/api.md lists them, and a test compares the two):

    honoured     it changes the answer as documented
    no effect    it is about the caller's own bookkeeping; accepted, changes nothing
    refused      known from other servers, not supported here: only its neutral values pass
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, WithJsonSchema, field_validator
from pydantic_core import PydanticCustomError

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 512  # characters
INT64 = 2**63
TokenId = Annotated[int, Field(ge=0, lt=2**32)]


def _as_list(value: object) -> object:
    if not isinstance(value, str | list):
        raise ValueError("must be a string or a list of strings")
    return [value] if isinstance(value, str) else value


StopStrings = Annotated[
    list[str],
    BeforeValidator(_as_list),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]


def refused(why: str, *neutral: object) -> Any:
    """A field only null and the `neutral` values of which pass."""
    return Field(default=None, description=f"Not supported: {why}", json_schema_extra={"refused": [*neutral]})  # type: ignore[list-item]


def no_effect(about: str) -> Any:
    """A field that is accepted and changes nothing in the answer."""
    return Field(default=None, description=f"Accepted, no effect: {about}", json_schema_extra={"no_effect": True})


class Strict(BaseModel):
    """A wire format: unknown fields, and refused fields with other than neutral values, are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _refuse(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]
        extra = field.json_schema_extra
        if isinstance(extra, dict) and "refused" in extra and value is not None and value not in extra["refused"]:  # type: ignore[operator]
            raise PydanticCustomError("unsupported", "{why}", {"why": field.description or ""})
        return value


class StreamOptions(Strict):
    """How a stream is written."""

    include_usage: bool | None = Field(None, description="Send a last chunk with the token counts.")
    include_obfuscation: bool | None = refused("chunks carry no padding.", False)


class SamplingFields(Strict):
    """Fields that /v1/completions and /v1/chat/completions have in common."""

    model: str = Field(description="The served model's name, as GET /v1/models lists it.")
    stream: bool | None = Field(None, description="Send the answer as server-sent events while it is made.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    n: int | None = Field(
        None, ge=1, le=128, description="1 to 128 choices per prompt; they share its KV pages. Default 1."
    )

    temperature: float | None = Field(None, ge=0, le=2, description="From 0, which is greedy, to 2. Default 1.")
    top_p: float | None = Field(
        None, ge=0, le=1, description="Keep the likeliest tokens up to this mass, 0 to 1. Default 1."
    )
    top_k: int | None = Field(
        None, ge=-1, lt=INT64, description="Keep this many likeliest tokens; -1 and 0 keep all. Default 0."
    )
    min_p: float | None = Field(
        None, ge=0, le=1, description="Drop tokens below this share, 0 to 1, of the likeliest one's."
    )
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="Off the logit of every token used; -2 to 2.")
    frequency_penalty: float | None = Field(
        None, ge=-2, le=2, description="Off the logit, for each use of a token; -2 to 2."
    )
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=100, description="Divides the logits of tokens seen; 0.01 to 100. Default 1."
    )
    logit_bias: dict[str, float] | None = Field(None, description="Token id to a bias from -100 to 100.")
    seed: int | None = Field(None, ge=-INT64, lt=INT64, description="The same seed draws the same answer.")

    stop: StopStrings | None = Field(
        None, description="Up to 16 strings of 1 to 512 characters; the answer ends before the first."
    )
    stop_token_ids: list[TokenId] | None = Field(None, description="Tokens that end the answer, besides the model's.")
    min_tokens: int | None = Field(None, ge=0, description="Nothing ends the answer before this many tokens.")
    ignore_eos: bool | None = Field(None, description="Go on after the model's own end token.")
    include_stop_str_in_output: bool | None = Field(None, description="Keep the stop string in the answer.")
    skip_special_tokens: bool | None = Field(None, description="Leave markup tokens out of the text. Default true.")
    priority: int | None = Field(None, ge=-INT64, lt=INT64, description="Lower runs earlier. Default 0.")
    kv_policy: str | None = Field(
        None, max_length=200, description="A longer window than the server's, such as k4v4:w512, or f16; see below."
    )

    user: str | None = no_effect("an id of your end user.")
    metadata: dict[str, str] | None = no_effect("your own notes on the request.")
    store: bool | None = no_effect("nothing is stored.")
    safety_identifier: str | None = no_effect("an id of your end user.")
    prompt_cache_key: str | None = no_effect("prefixes are shared by content.")
    prompt_cache_retention: str | None = no_effect("prefixes stay while there is room.")
    service_tier: Literal["auto", "default"] | None = no_effect("there is one tier.")

    prompt_cache_options: Any = refused("prefixes are shared by content, use prompt_cache_key or nothing.")
    moderation: Any = refused("there is no moderation model here.")
    structured_outputs: Any = refused("output cannot be constrained to a grammar.")
    guided_json: Any = refused("output cannot be constrained to a grammar.")
    guided_regex: Any = refused("output cannot be constrained to a grammar.")
    guided_choice: Any = refused("output cannot be constrained to a grammar.")
    guided_grammar: Any = refused("output cannot be constrained to a grammar.")
    use_beam_search: Any = refused("answers are sampled; use n for several.", False)
    length_penalty: Any = refused("it belongs to beam search.", 1.0)
    allowed_token_ids: Any = refused("use logit_bias.", [])
    bad_words: Any = refused("use logit_bias.", [])
    truncate_prompt_tokens: Any = refused("prompts are never cut; shorten it yourself.")

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, value: list[str] | None) -> list[str] | None:
        stops = value or []
        if len(stops) > MAX_STOP_STRINGS:
            raise ValueError(f"at most {MAX_STOP_STRINGS} stop strings are allowed, found {len(stops)}")
        if any(not 1 <= len(stop) <= MAX_STOP_LENGTH for stop in stops):
            raise ValueError(f"a stop string has 1 to {MAX_STOP_LENGTH} characters")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _check_bias(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for token, bias in (value or {}).items():
            if re.fullmatch(r"0|[1-9][0-9]{0,9}", token) is None:
                raise ValueError(f"keys are token ids, found '{token[:20]}'")
            if not -100 <= bias <= 100:
                raise ValueError(f"the bias of token {token} is {bias}; it must be from -100 to 100")
        return value

    @field_validator("stream_options")
    @classmethod
    def _check_stream_options(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise ValueError("only allowed when stream is true")
        return value

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(description="Prompt tokens found in the prefix cache.")


class Usage(BaseModel):
    """Token counts; a prompt counts once however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = Field(description="Null when a stop string ended the answer.")
