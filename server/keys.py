"""Who may ask: API keys, hashed in memory, and what each may take.

A file of keys is TOML, one table a key; it is read again when it changes, and a version that cannot be read leaves the
last good one in force:

    [[key]]
    name = "alice"
    key = "..."                  or  sha256 = "64 hexadecimal digits"
    requests-per-minute = 60     optional
    max-concurrent = 4           optional
"""

import hashlib
import hmac
import logging
import re
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FIELDS = ("name", "key", "sha256", "requests-per-minute", "max-concurrent")
CHECK_S = 1.0  # between two looks at the file
log = logging.getLogger(__name__)


class KeyFileError(ValueError):
    """The keys cannot be read; the message names the file, the key and the field."""


@dataclass(frozen=True)
class Key:
    """One caller. Of the key itself only the hash is kept."""

    name: str
    digest: bytes  # SHA-256
    requests_per_minute: int | None = None
    max_concurrent: int | None = None


@dataclass
class Usage:
    """What a caller has taken. A bucket that holds a minute's requests and fills evenly."""

    num_running: int = 0
    tokens: float | None = None  # None: full
    filled_at: float = 0.0

    def take(self, per_minute: int, now: float) -> float:
        """Take one request; returns 0, or the seconds until there is one."""
        tokens = per_minute if self.tokens is None else self.tokens + (now - self.filled_at) * per_minute / 60
        self.tokens, self.filled_at = min(float(per_minute), tokens), now
        if self.tokens < 1:
            return (1 - self.tokens) * 60 / per_minute
        self.tokens -= 1
        return 0.0


@dataclass
class KeyRing:
    """The keys in force. `clock` is time.monotonic but in tests."""

    single: str | None = None  # --api-key
    file: Path | None = None  # --api-keys
    clock: Callable[[], float] = time.monotonic
    _keys: tuple[Key, ...] = ()
    _usage: dict[str, Usage] = field(default_factory=dict)  # by name; outlives a change of the file
    _seen: tuple[int, int] = (0, 0)  # modification time and size of the file as it was read
    _checked_at: float = 0.0

    def __post_init__(self) -> None:
        """Raises KeyFileError."""
        if self.file is not None:
            self._seen = _version(self.file)
        self._keys = self._read()
        self._checked_at = self.clock()

    @property
    def is_open(self) -> bool:
        """Whether anybody may ask."""
        return self.single is None and self.file is None

    def find(self, token: str) -> Key | None:
        """The key that `token` is. Looks at all of them in constant time."""
        self._reload()
        digest, found = _hash(token), None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def usage(self, key: Key) -> Usage:
        return self._usage.setdefault(key.name, Usage())

    def _reload(self) -> None:
        now = self.clock()
        if self.file is None or now - self._checked_at < CHECK_S:
            return
        self._checked_at = now
        try:
            version = _version(self.file)
            if version == self._seen:
                return
            self._seen = version
            self._keys = self._read()
        except KeyFileError as error:
            log.error("%s; the keys read before stay in force", error)
        else:
            log.warning("%d API keys read from %s", len(self._keys), self.file)

    def _read(self) -> tuple[Key, ...]:
        keys = () if self.file is None else read_keys(self.file)
        if self.single is None:
            return keys
        if any(key.name == "default" for key in keys):
            raise KeyFileError(f"{self.file}: 'default' is the name of --api-key; give the key another one")
        return (*keys, Key("default", _hash(self.single)))


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file. Raises KeyFileError."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise KeyFileError(f"--api-keys {path}: {error.strerror}") from None
    except ValueError as error:
        raise KeyFileError(f"--api-keys {path}: {error}") from None
    entries = table.get("key")
    if not isinstance(entries, list) or not entries or table.keys() != {"key"}:
        raise KeyFileError(f"--api-keys {path}: write one [[key]] table for each key, and nothing else")
    keys = [_read_key(path, number, entry) for number, entry in enumerate(entries, start=1)]
    for kind, values in (("name", [key.name for key in keys]), ("key", [key.digest for key in keys])):
        if len(set(values)) < len(values):
            raise KeyFileError(f"--api-keys {path}: two entries have the same {kind}")
    return tuple(keys)


def _read_key(path: Path, number: int, entry: Any) -> Key:
    place = f"--api-keys {path}: key {number}"
    if not isinstance(entry, dict):
        raise KeyFileError(f"{place} is no table; write [[key]]")
    if unknown := sorted(entry.keys() - set(FIELDS)):
        raise KeyFileError(f"{place} has an unknown field '{unknown[0]}'; known are {', '.join(sorted(FIELDS))}")
    name, secret, digest = (entry.get(field) for field in ("name", "key", "sha256"))
    if not isinstance(name, str) or not name:
        raise KeyFileError(f"{place} has no name")
    if (secret is None) == (digest is None):
        raise KeyFileError(f"{place} ({name}) needs either key or sha256")
    if secret is not None and (not isinstance(secret, str) or not secret):
        raise KeyFileError(f"{place} ({name}): key must be a text")
    if digest is not None and not (isinstance(digest, str) and re.fullmatch(r"[0-9a-fA-F]{64}", digest)):
        raise KeyFileError(f"{place} ({name}): sha256 must have 64 hexadecimal digits")
    limits = {}
    for limit in ("requests-per-minute", "max-concurrent"):
        value = entry.get(limit)
        if value is not None and (type(value) is not int or value < 1):
            raise KeyFileError(f"{place} ({name}): {limit} must be a whole number of at least 1")
        limits[limit.replace("-", "_")] = value
    return Key(name, _hash(secret) if secret is not None else bytes.fromhex(str(digest)), **limits)


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _version(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise KeyFileError(f"--api-keys {path}: {error.strerror}") from None
    return status.st_mtime_ns, status.st_size
