"""What the person who starts the server sees."""

import io
import json
import shlex
from typing import Any

import msgspec
import pytest
from rich.console import Console

from engine.messages import CacheMemory, Inspection, KernelUse, Loading, SequenceMemory
from server.screen import Door, LoadingBar, curl, print_inspection, print_start, size
from tests.fakes import PLAN

DOOR = Door("http://localhost:8000")


def screen(chat: bool = True, door: Door = DOOR, **changes: Any) -> str:
    out = io.StringIO()
    plan = msgspec.structs.replace(PLAN, notes=("context limited by memory",), **changes)
    print_start(Console(file=out, width=100, highlight=False), plan, "demo", door, chat)
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


def test_memory_of_the_cache_is_all_of_it() -> None:
    """Bug: pages alone here, pages and recent pages in nibble inspect."""
    text = screen(kv_policy="k4v4", num_recent_pages=8, bytes_per_recent_page=1 << 17)
    assert "k4v4, 2.0 MiB, prefix caching on" in text
    assert "64 pages of 16 in 1.0 MiB; 1.0 MiB for recent tokens in f16" in text


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
    words = shlex.split(joined(curl(DOOR, name, chat)))
    assert json.loads(words[-1])["model"] == name
    assert json.loads(words[-1])["max_tokens"] == 64
    assert ("chat" in words[2]) == chat
    command = next(line for line in joined(screen(chat)).splitlines() if line.startswith("curl"))
    assert json.loads(shlex.split(command)[-1])["model"] == "demo"


def test_what_guards_the_door_is_said_and_the_example_gets_in() -> None:
    """Bug: an example that is answered with 401, or that does not trust the server's own certificate."""
    door = Door("https://localhost:8000", (("access", "requests need a key of keys.toml"),), True, "my cert.pem")
    text = screen(door=door)
    assert "requests need a key of keys.toml" in text
    words = shlex.split(joined(next(part for part in text.split("Try it:") if "curl" in part)))
    assert words[words.index("--cacert") + 1] == "my cert.pem"
    assert "Authorization: Bearer $KEY" in words


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


F16 = CacheMemory(16, 1 << 20, 1024, 1024, 1024, 0, [])


def inspection(kv: CacheMemory = F16, **changes: Any) -> str:
    out = io.StringIO()
    plan = msgspec.structs.replace(PLAN, notes=("head rounded",), **changes)
    found = Inspection(plan, weight_bytes_per_token=4 << 20, bandwidth=40e9, isa="avx512", kv=kv)
    print_inspection(Console(file=out, width=120, highlight=False), found)
    return out.getvalue()


def test_inspection_shows_what_is_read_and_how_fast_it_could_be() -> None:
    """Bug: a roof computed from another number than the bytes shown, or one for a context the model cannot have."""
    text = inspection()
    for fact in (
        "linear 4-bit g64",
        "1.0 MiB",
        "25%",  # of the 4 MiB
        "native: not built",
        "40.0 GB/s read by 1 thread, avx512",
        "9,536.7 tokens/s for one sequence, 0 tokens",  # 40e9 / 4 MiB
        "8,477.1 tokens/s for one sequence, 512 tokens",  # 1 KiB more for each of them
        "100.0 tokens/s with an empty cache, 1% of it",
        "head rounded",
    ):
        assert fact in text
    assert "4,096 tokens in the cache" not in text


def test_inspection_says_what_a_quantized_cache_takes() -> None:
    """Bug: bits that leave out scales and windows, which short sequences are made of."""
    one = SequenceMemory(512, page_bytes=3 << 20, recent_bytes=1 << 20, f16_bytes=12 << 20, bits=5.333)
    kv = CacheMemory(4.25, 8 << 20, 1024, 272, 1 << 20, 187, [one])
    text = inspection(kv, kv_policy="k4v4", kv_elements_per_token=2048, kv_bytes_per_token=1088)
    for fact in (
        "k4v4, 1.1 KiB a token, 4.25 bits with scales; f16 1.0 MiB",
        "1,024 tokens fit in 8.0 MiB; 272 in f16",
        "3.0 MiB of pages and 1.0 MiB of recent tokens in f16: 5.33 bits, f16 12.0 MiB",
        "less than in f16 from 187 tokens on",
    ):
        assert fact in text
    assert "f16, 1.0 KiB a token; 1,024 tokens fit in 1.0 MiB" in inspection()
    assert "k4v4, 4.25 bits with scales" in screen(
        kv_policy="k4v4", kv_elements_per_token=2048, kv_bytes_per_token=1088
    )


def test_inspection_without_refusals_has_no_column_for_them() -> None:
    assert "why" not in inspection(kernels=[KernelUse("7 x affine", "native", "", 1 << 20)])
    assert "why" in inspection()


def test_a_roof_is_shown_once() -> None:
    """Bug: the same line twice for a model of 4,096 tokens."""
    assert inspection(max_model_len=4096).count("4,096 tokens in the cache") == 1


def test_inspection_without_the_library_says_so() -> None:
    out = io.StringIO()
    print_inspection(Console(file=out, width=120), Inspection(PLAN, 4 << 20, bandwidth=None, isa=None, kv=F16))
    assert "not measured: that takes the C++ kernels" in out.getvalue()
    assert "roof" not in out.getvalue()
