"""GET /v1/models, POST /tokenize and POST /detokenize."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from server.schemas.chat import Message
from server.schemas.common import Strict, TokenId


class Model(BaseModel):
    """A served model. The last four are null until it is loaded."""

    model_config = ConfigDict(protected_namespaces=())

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["nibble"] = "nibble"
    max_model_len: int | None = None
    format: str | None = None
    architecture: str | None = None
    kv_policy: str | None = None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class TokenizeRequest(Strict):
    """A text or a conversation to count."""

    model: str | None = Field(None, description="The served model's name.")
    prompt: str | None = Field(None, description="A text; give this or messages.")
    messages: list[Message] | None = Field(None, min_length=1, description="A conversation, for the chat template.")
    add_special_tokens: bool = Field(True, description="Let the tokenizer add BOS to a text prompt.")
    add_generation_prompt: bool = Field(True, description="Let the template open the assistant's turn.")
    return_token_strs: bool = Field(False, description="Also return the text of each token.")

    @model_validator(mode="after")
    def _check_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class TokenizeResponse(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int | None
    token_strs: list[str] | None = None


class DetokenizeRequest(Strict):
    """Token ids to read."""

    model: str | None = Field(None, description="The served model's name.")
    tokens: list[TokenId] = Field(description="Token ids.")
    skip_special_tokens: bool = Field(False, description="Leave markup tokens out.")


class DetokenizeResponse(BaseModel):
    prompt: str
