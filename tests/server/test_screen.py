"""What the person who starts the server sees."""

import io
import json
import shlex
from typing import Any

import msgspec
import pytest
from rich.console import Console

from engine.messages import KernelUse, Loading
from server.screen import LoadingBar, curl, print_start, size
from tests.fakes import PLAN


def screen(chat: bool = True, **changes: Any) -> str:
    out = io.StringIO()
    plan = msgspec.structs.replace(PLAN, notes=("context limited by memory",), **changes)
    print_start(Console(file=out, width=100, highlight=False), plan, "demo", "http://localhost:8000", chat)
    return out.getvalue()


def test_one_screen_has_every_decision() -> None:
    """Bug: a server that decided something and told nobody."""
    text = screen()
    for fact in (
        "fake 4-bit g64",
        "linear 4-bit g64: native",
        "attention f16: reference (native: not built)",
        "1,024 tokens fit: 64 pages of 16",
        "f16, 1.0 MiB, prefix caching on",
        "512 tokens at most",
        "100.0 tokens/s",
        "context limited by memory",
        "http://localhost:8000",
    ):
        assert fact in text
    assert text.count("\n") <= 24


def test_kernels_with_the_same_story_share_a_line() -> None:
    """Bug: a screen of six lines that all say the same, in which the one that differs is not seen."""
    slow = [KernelUse(what, "reference", "") for what in ("42 x affine", "25 x norm", "6 x swiglu")]
    refused = KernelUse("1 x rope", "reference", "native: odd width")
    lines = [line.split(maxsplit=1)[1] for line in screen(kernels=[*slow, refused]).splitlines() if "kernel " in line]
    assert [line.strip() for line in lines] == [
        "42 x affine, 25 x norm, 6 x swiglu: reference",
        "1 x rope: reference (native: odd width)",
    ]


def test_one_thread_is_not_many() -> None:
    assert "1 thread\n" in "".join(line.rstrip() + "\n" for line in screen().splitlines())
    assert "2 threads" in screen(threads=2)


def test_log_files_get_no_bar() -> None:
    """Bug: empty lines in front of every error, of a bar that only a terminal can show."""
    out = io.StringIO()
    bar = LoadingBar(Console(file=out), "demo")
    bar.start()
    bar.update(Loading(1, 4))
    bar.stop()
    assert out.getvalue() == ""


def joined(command: str) -> str:
    """As a shell reads it: a backslash at the end of a line continues it."""
    return command.replace("\\\n", "")


@pytest.mark.parametrize("chat", [True, False])
def test_curl_can_be_pasted(chat: bool) -> None:
    """Bug: an example broken over lines or by quotes."""
    name = 'it\'s "odd"'
    words = shlex.split(joined(curl("http://localhost:8000", name, chat)))
    assert json.loads(words[-1])["model"] == name
    assert json.loads(words[-1])["max_tokens"] == 64
    assert ("chat" in words[2]) == chat
    command = next(line for line in joined(screen(chat)).splitlines() if line.startswith("curl"))
    assert json.loads(shlex.split(command)[-1])["model"] == "demo"


def test_loading_bar_follows_the_engine() -> None:
    out = io.StringIO()
    bar = LoadingBar(Console(file=out, force_terminal=True, width=100), "demo")
    bar.start()
    bar.update(Loading(1 << 20, 4 << 20))
    bar.stop()
    assert "demo" in out.getvalue()
    assert "1.0/4.2 MB" in out.getvalue() or "1.0/4.0 MiB" in out.getvalue()


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(10, "10 B"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB"), (1 << 42, "4096.0 GiB")]
)
def test_sizes(num_bytes: int, text: str) -> None:
    assert size(num_bytes) == text
