"""Messages and the checkpoint's own template to a prompt."""

from collections.abc import Mapping, Sequence
from typing import Any

from server.errors import InvalidRequest
from server.schemas.chat import ChatRequest, Message
from server.tokenizer import TemplateError, Tokenizer


def chat_prompt(request: ChatRequest, tokenizer: Tokenizer) -> str:
    """The prompt of the conversation to answer or continue. Raises InvalidRequest."""
    continues = bool(request.continue_final_message)
    opens = request.add_generation_prompt if request.add_generation_prompt is not None else not continues
    options = dict(request.chat_template_kwargs or {})
    options |= {"continue_final_message": continues, "add_generation_prompt": opens}
    return template_text(request.messages, tokenizer, **options)


def template_text(messages: Sequence[Message], tokenizer: Tokenizer, **options: Any) -> str:
    """What the template makes of `messages`. Raises InvalidRequest with the template's own words.

    The template writes the special tokens itself, so none may be added when its text is encoded.
    """
    if not tokenizer.has_chat_template:
        raise InvalidRequest(
            "This model has no chat template. Use /v1/completions, or start the server with --chat-template FILE",
            param="messages",
            code="no_chat_template",
        )
    try:
        return tokenizer.render(template_messages(messages), **options)
    except TemplateError as error:
        raise InvalidRequest(str(error), param="messages", code="chat_template_error") from error


def template_messages(messages: Sequence[Message]) -> list[Mapping[str, Any]]:
    """Messages as templates expect them: plain text, and "developer" under its older name "system"."""
    return [
        {"role": "system" if message.role == "developer" else message.role, "content": message.text}
        | ({} if message.name is None else {"name": message.name})
        for message in messages
    ]
