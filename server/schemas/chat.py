"""POST /v1/chat/completions."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, WithJsonSchema, field_validator

from server.schemas.common import SamplingFields, Strict, Usage, no_effect, refused

TOOLS = "this server does not call tools."


class TextPart(Strict):
    """A piece of a message."""

    type: Literal["text"] = Field(description="Only text is understood.")
    text: str


def _as_parts(value: object) -> object:
    if not isinstance(value, str | list):
        raise ValueError("must be a string or a list of text parts")
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Content = Annotated[
    list[TextPart],
    BeforeValidator(_as_parts),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}),
]


class Message(Strict):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="system, developer (the same), user or assistant."
    )
    content: Content = Field(description="A string, or text parts, which are joined by newlines.")
    name: str | None = Field(None, description="Handed to the chat template; refused when that makes no use of it.")
    refusal: Any = refused("an answer is never split into text and refusal.")
    annotations: Any = refused("there are no tools to annotate from.", [])
    audio: Any = refused("only text is understood.")
    tool_calls: Any = refused(TOOLS, [])
    function_call: Any = refused(TOOLS)

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.content)


class ChatRequest(SamplingFields):
    """A conversation to continue."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "model": "demo",
                "messages": [{"role": "user", "content": "Tell me a story."}],
                "max_tokens": 64,
            }
        }
    )

    messages: list[Message] = Field(min_length=1, description="The conversation so far.")
    max_tokens: int | None = Field(
        None, ge=1, description="Most tokens of the answer. Default: the rest of the context."
    )
    max_completion_tokens: int | None = Field(None, ge=1, description="The newer name of max_tokens.")
    logprobs: bool | None = Field(None, description="Return the log-probability of every token.")
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="And of this many likeliest, up to 20; needs logprobs."
    )
    add_generation_prompt: bool | None = Field(
        None, description="Let the template open the assistant's turn. Default: unless continue_final_message."
    )
    continue_final_message: bool | None = Field(
        None, description="Continue the last message, which must be the assistant's, do not answer it."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Variables of the chat template; refused when it has none such."
    )

    tools: Any = refused(TOOLS, [])
    tool_choice: Any = refused(TOOLS, "none", "auto")
    parallel_tool_calls: bool | None = no_effect(TOOLS)
    functions: Any = refused(TOOLS, [])
    function_call: Any = refused(TOOLS, "none", "auto")
    response_format: Any = refused("output cannot be constrained.", {"type": "text"})
    modalities: Any = refused("only text comes out.", ["text"])
    audio: Any = refused("only text comes out.")
    prediction: Any = refused("there is no use for predicted output here.")
    reasoning_effort: Any = refused("use chat_template_kwargs for what the model's template offers.", "none")
    verbosity: Any = refused("ask for it in the prompt.", "medium")
    web_search_options: Any = refused("there is no web search here.")
    chat_template: Any = refused("the server's template is used; see --chat-template.")
    echo: Any = refused("use /v1/completions.", False)
    documents: Any = refused("put them into a message.", [])

    @field_validator("max_completion_tokens")
    @classmethod
    def _check_names(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("max_tokens") not in (None, value):
            raise ValueError("differs from max_tokens; give one of them")
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _check_top(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise ValueError("only allowed when logprobs is true")
        return value

    @field_validator("continue_final_message")
    @classmethod
    def _check_continue(cls, value: bool | None, info: ValidationInfo) -> bool | None:
        if value and info.data.get("add_generation_prompt"):
            raise ValueError("not allowed together with add_generation_prompt")
        messages = info.data.get("messages")
        if value and messages and messages[-1].role != "assistant":
            raise ValueError(f"only an assistant's message can be continued, and the last is the {messages[-1].role}'s")
        return value

    @field_validator("chat_template_kwargs")
    @classmethod
    def _check_kwargs(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        for name in sorted(set(value or {}) & RESERVED_KWARGS):
            raise ValueError(f"'{name}' cannot be set here")
        return value


RESERVED_KWARGS = frozenset(
    (
        "messages",
        "conversation",
        "self",
        "tokenizer",
        "sanitize_control_tokens",
        "tools",
        "documents",
        "chat_template",
        "tokenize",
        "add_generation_prompt",
        "continue_final_message",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "processor_kwargs",
        "padding",
        "truncation",
        "max_length",
    )
)


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatResponse(BaseModel):
    """The whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class ChatChunk(BaseModel):
    """One event of a streamed answer. Only the fields set are sent."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
