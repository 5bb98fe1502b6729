"""What may stand in a conversation, and how chat templates expect it. The HTTP API has the same rules."""

from collections.abc import Iterable, Mapping
from typing import Any

import jinja2

Message = Mapping[str, Any]  # "role" and "content", and what else the chat template reads

ROLES = ("system", "developer", "user", "assistant", "tool")
TURNS = ("add_generation_prompt", "continue_final_message")  # how the text ends; every template has these


def check_variables(variables: Iterable[str], template: str) -> None:
    """Raises TypeError for a variable that the template does not read."""
    others = [name for name in variables if name not in TURNS]
    known = _names(template, but_attributes=True) if others else frozenset()
    for name in others:
        if name not in known:
            raise TypeError(f"this model's chat template has no variable {name!r}")


def template_messages(messages: Iterable[Message], template: str) -> list[dict[str, Any]]:
    """Messages as templates expect them: plain text, and "developer" under its older name "system".

    Raises TypeError for what is no message and ValueError for one that is not whole, or has what the template ignores.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Iterable):
        raise TypeError("messages must be a list of mappings with 'role' and 'content'")
    checked = [_checked(message, f"messages[{i}]", template) for i, message in enumerate(messages)]
    if not checked:
        raise ValueError("messages must hold at least one message")
    return checked


def _checked(message: Message, where: str, template: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TypeError(f"{where} must be a mapping with 'role' and 'content'; found {message!r}")
    for name in ("role", "content"):
        if name not in message:
            raise ValueError(f"{where} has no {name!r}")
    role = message["role"]
    if role not in ROLES:
        raise ValueError(f"{where}['role'] must be one of {', '.join(ROLES)}; found {role!r}")
    others = {name: value for name, value in message.items() if name not in ("role", "content")}
    for name in others:
        if name not in _names(template):
            raise ValueError(f"{where} has {name!r}, which this model's chat template does not read")
    content = _text(message["content"], f"{where}['content']")
    return {"role": "system" if role == "developer" else role, "content": content} | others


def _text(content: object, where: str) -> str:
    """A string, or text parts, which are joined by newlines. Raises ValueError."""
    if isinstance(content, str):
        return content
    parts: list[Any] = content if isinstance(content, list) else [None]
    texts = [part["text"] for part in parts if _is_text_part(part)]
    if len(texts) < len(parts):
        raise ValueError(f"{where} must be a string or a list of {{'type': 'text', 'text': ...}}; found {content!r}")
    return "\n".join(texts)


def _is_text_part(part: object) -> bool:
    return (
        isinstance(part, dict)
        and set(part) == {"type", "text"}
        and part["type"] == "text"
        and isinstance(part["text"], str)
    )


def _names(template: str, but_attributes: bool = False) -> frozenset[str]:
    """Names in the code of a Jinja template; with attributes also strings: m.name and m['name'] are the same.

    Only the lexer is used: it knows no statements, so it reads templates for any set of extensions. Raises ValueError.
    """
    names, before = set(), ""
    try:
        for _, kind, value in jinja2.Environment().lex(template):
            if (kind == "name" and not (but_attributes and before == ".")) or (kind == "string" and not but_attributes):
                names.add(value.strip("'\""))
            if kind != "whitespace":
                before = value
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not Jinja, line {error.lineno}: {error.message}") from error
    return frozenset(names)
