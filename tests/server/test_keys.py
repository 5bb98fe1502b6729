"""API keys: how they are read, found, limited and read again."""

import hashlib
import os
from pathlib import Path

import pytest

from server.keys import Key, KeyFileError, KeyRing, Usage, read_keys

KEYS = '[[key]]\nname = "alice"\nkey = "secret"\nrequests-per-minute = 60\n'


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_keys_are_found_by_what_they_are_and_kept_only_as_hashes(tmp_path: Path) -> None:
    """Bug: a key that anybody can read in a dump of the process, or that is found by its beginning."""
    digest = hashlib.sha256(b"other").hexdigest()
    path = write(tmp_path / "keys", f'{KEYS}[[key]]\nname = "bob"\nsha256 = "{digest}"\nmax-concurrent = 2\n')
    ring = KeyRing("mine", path)
    assert ring.find("secret") == Key("alice", hashlib.sha256(b"secret").digest(), 60, None)
    assert ring.find("other") == Key("bob", hashlib.sha256(b"other").digest(), None, 2)
    assert ring.find("mine") == Key("default", hashlib.sha256(b"mine").digest())
    assert ring.find("secre") is ring.find("") is ring.find(digest) is None
    assert "secret" not in repr(ring._keys)
    assert not ring.is_open
    assert KeyRing().is_open


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "one [[key]] table"),
        ("key = 1", "one [[key]] table"),
        ("[[key]]\n[oops", "Expected ']'"),
        ('[[key]]\nkey = "x"', "key 1 has no name"),
        ('[[key]]\nname = "a"', "needs either key or sha256"),
        ('[[key]]\nname = "a"\nsha256 = "12"', "64 hexadecimal digits"),
        (KEYS + "max-concurrent = 0", "max-concurrent must be"),
        (KEYS + "rpm = 3", "unknown field 'rpm'"),
        (KEYS + KEYS, "the same name"),
        (KEYS + KEYS.replace("alice", "bob"), "the same key"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, text: str, complaint: str) -> None:
    path = write(tmp_path / "keys", text)
    with pytest.raises(KeyFileError) as caught:
        read_keys(path)
    assert complaint in str(caught.value)
    assert str(path) in str(caught.value)


def test_the_file_is_read_again_and_a_broken_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: a key that is revoked and still works; a slip in an editor that locks everybody out."""
    now = 0.0
    path = write(tmp_path / "keys", KEYS)
    ring = KeyRing(None, path, clock=lambda: now)
    first = ring.find("secret")
    assert first is not None
    ring.usage(first).num_running = 1
    write(path, KEYS.replace("secret", "fresh"))
    assert ring.find("fresh") is None  # looked a moment ago
    now = 2.0
    fresh = ring.find("fresh")
    assert fresh is not None
    assert ring.find("secret") is None
    assert ring.usage(fresh).num_running == 1
    write(path, "[[key]]\nbroken")
    now = 4.0
    assert ring.find("fresh") is not None
    assert "stay in force" in caplog.text
    os.unlink(path)
    now = 6.0
    assert ring.find("fresh") is not None


def test_a_minutes_requests_come_at_once_and_then_evenly() -> None:
    """Bug: a limit that never refills, or that counts what was refused."""
    usage = Usage()
    assert [usage.take(60, now=0.0) for _ in range(60)] == [0.0] * 60
    assert usage.take(60, now=0.0) == pytest.approx(1.0)
    assert usage.take(60, now=0.5) == pytest.approx(0.5)
    assert usage.take(60, now=1.0) == 0.0
    assert usage.take(60, now=1.0) > 0
    assert usage.take(60, now=1e6) == 0.0
    assert usage.tokens == 59.0
