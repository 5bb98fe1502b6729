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
    if tokenizer.has_chat_template:
        _check_variables(options, tokenizer.template_variables)
    options |= {"continue_final_message": continues, "add_generation_prompt": opens}
    return template_text(request.messages, tokenizer, **options)


def _check_variables(options: Mapping[str, Any], known: frozenset[str]) -> None:
    """Raises InvalidRequest for a variable that the template does not read."""
    for name in sorted(set(options) - known):
        raise InvalidRequest(
            f"chat_template_kwargs.{name}: this model's chat template has no such variable",
            param=f"chat_template_kwargs.{name}",
            code="unknown_field",
        )


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
    plain = template_messages(messages)
    try:
        text = tokenizer.render(plain, **options)
        nameless = [{key: value for key, value in message.items() if key != "name"} for message in plain]
        if nameless == plain or tokenizer.render(nameless, **options) != text:
            return text
    except TemplateError as error:
        raise InvalidRequest(str(error), param="messages", code="chat_template_error") from error
    number = next(i for i, message in enumerate(messages) if message.name is not None)
    raise InvalidRequest(
        f"messages[{number}].name: this model's chat template makes no use of names",
        param=f"messages[{number}].name",
        code="unsupported_field",
    )


def template_messages(messages: Sequence[Message]) -> list[Mapping[str, Any]]:
    """Messages as templates expect them: plain text, and "developer" under its older name "system"."""
    return [
        {"role": "system" if message.role == "developer" else message.role, "content": message.text}
        | ({} if message.name is None else {"name": message.name})
        for message in messages
    ]
