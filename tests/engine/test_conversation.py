"""What a conversation may hold; how it becomes a prompt is in test_llm.py."""

import re
from typing import Any

import pytest

from engine.conversation import Message, check_variables, template_messages

TEMPLATE = "{% for m in messages %}{{ m.role + m['content'] + (m.thoughts or '') }}{% endfor %}{{ mood }} prose"
ASKED = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("messages", "kind", "words"),
    [
        ("Hi", TypeError, "messages must be a list of mappings with 'role' and 'content'"),
        (ASKED, TypeError, "messages must be a list of mappings"),
        (["Hi"], TypeError, "messages[0] must be a mapping with 'role' and 'content'; found 'Hi'"),
        ([], ValueError, "messages must hold at least one message"),
        ([ASKED, {"role": "user"}], ValueError, "messages[1] has no 'content'"),
        ([{"content": "Hi"}], ValueError, "messages[0] has no 'role'"),
        (
            [ASKED | {"role": "userr"}],
            ValueError,
            "must be one of system, developer, user, assistant, tool; found 'userr'",
        ),
        ([ASKED | {"content": None}], ValueError, "messages[0]['content'] must be a string or a list of {'type'"),
        ([ASKED | {"content": [{"type": "image"}]}], ValueError, "messages[0]['content'] must be a string or a list"),
        ([ASKED | {"foo": 3}], ValueError, "messages[0] has 'foo', which this model's chat template does not read"),
        ([ASKED | {"prose": 3}], ValueError, "messages[0] has 'prose', which"),
    ],
)
def test_what_a_template_would_ignore_is_refused(messages: Any, kind: type[Exception], words: str) -> None:
    """Bug: a message without content, a role or a field misspelt, and an answer to something else."""
    with pytest.raises(kind, match=re.escape(words)):
        template_messages(messages, TEMPLATE)


def test_messages_become_what_templates_read() -> None:
    """Bug: the HTTP API and a program give the same conversation different prompts."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages: list[Message] = [{"role": "developer", "content": parts}, ASKED | {"thoughts": "c"}]
    plain = [{"role": "system", "content": "a\nb"}, ASKED | {"thoughts": "c"}]
    assert template_messages(messages, TEMPLATE) == plain


@pytest.mark.parametrize("name", ["bogus", "content", "prose"])
def test_a_variable_that_the_template_does_not_read_is_refused(name: str) -> None:
    """Bug: enable_thinkin=False changes nothing; an attribute or the template's prose taken for a variable."""
    check_variables(["mood", "add_generation_prompt"], TEMPLATE)
    with pytest.raises(TypeError, match=f"this model's chat template has no variable '{name}'"):
        check_variables([name], TEMPLATE)
