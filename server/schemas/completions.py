"""POST /v1/completions."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from server.schemas.common import SamplingFields, Usage, refused

MAX_PROMPTS = 128


class CompletionRequest(SamplingFields):
    """A text, or several, to continue."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"model": "demo", "prompt": "Once upon a time", "max_tokens": 64}}
    )

    prompt: Any = Field(
        description="A string or token ids, or up to 128 of either. Choices of prompt i have index i*n to i*n+n-1.",
        json_schema_extra={
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            ]
        },
    )
    echo: bool | None = Field(None, description="Put the prompt in front of the answer.")
    max_tokens: int | None = Field(None, ge=0, description="Most tokens of an answer; 0 only with echo. Default 16.")
    logprobs: int | None = Field(
        None, ge=0, le=20, description="Log-probabilities of the tokens and this many likeliest ones, up to 20."
    )
    best_of: int | None = Field(None, description="Refused unless equal to n: all choices made are returned.")
    add_special_tokens: bool | None = Field(
        None, description="Let the tokenizer add BOS to text prompts. Default true."
    )

    suffix: Any = refused("text cannot be inserted in the middle.", "")
    response_format: Any = refused("output cannot be constrained.", {"type": "text"})
    prompt_logprobs: Any = refused("use echo with logprobs.")

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, value: Any) -> Any:
        prompts = value if _is_batch(value) else [value]
        if not 1 <= len(prompts) <= MAX_PROMPTS:
            raise ValueError(f"1 to {MAX_PROMPTS} prompts are allowed, found {len(prompts)}")
        if all(isinstance(prompt, str) for prompt in prompts) or all(map(_is_ids, prompts)):
            return value
        raise ValueError("must be a string, a list of strings, a list of token ids, or a list of such lists")

    @field_validator("max_tokens")
    @classmethod
    def _check_max_tokens(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value == 0 and not info.data.get("echo"):
            raise ValueError("0 is only allowed when echo is true")
        return value

    @field_validator("best_of")
    @classmethod
    def _check_best_of(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value != (info.data.get("n") or 1):
            raise PydanticCustomError("unsupported", "Not supported unless equal to n; ask for n choices and rank them")
        return value

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        return self.prompt if _is_batch(self.prompt) else [self.prompt]


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def _is_batch(value: object) -> bool:
    return isinstance(value, list) and not (value and _is_ids(value))


class CompletionLogprobs(BaseModel):
    """Parallel lists, one entry per token; the first token of an echoed prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionResponse(BaseModel):
    """The whole answer, or one event of a streamed one. Only the fields set are sent."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
