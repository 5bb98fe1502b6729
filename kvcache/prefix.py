"""Full pages by content: a chained hash of the tokens up to and including the page names it.

    key(page i) = H(key(page i-1) || tokens of page i),   key(page -1) = H(salt)

The salt names all that decides a page's bytes besides the tokens: model, policy, calibration. A page nobody holds any
more stays here, least recently used first out, until someone needs the room.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

DIGEST_BYTES = 16


def root_key(salt: str) -> bytes:
    """The key that stands before the first page."""
    return blake2b(salt.encode(), digest_size=DIGEST_BYTES).digest()


def next_key(previous: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a page that holds `tokens` and follows the page (or root) named `previous`."""
    return blake2b(previous + array("q", tokens).tobytes(), digest_size=DIGEST_BYTES).digest()


class PrefixIndex:
    """key -> page, and which of those pages are idle (held by this index alone)."""

    def __init__(self) -> None:
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._cold: OrderedDict[int, None] = OrderedDict()  # idle as well; all of these go first

    @property
    def num_idle(self) -> int:
        return len(self._idle) + len(self._cold)

    def find(self, key: bytes) -> int | None:
        return self._page_of.get(key)

    def insert(self, key: bytes, page: int) -> bool:
        """Publish a full page. False when the content is already there: the caller's copy stays private."""
        if key in self._page_of:
            return False
        self._page_of[key] = page
        self._key_of[page] = key
        return True

    def holds(self, page: int) -> bool:
        return page in self._key_of

    def is_idle(self, page: int) -> bool:
        return page in self._idle or page in self._cold

    def park(self, page: int, cold: bool = False) -> None:
        """The last sequence left a published page: keep it, as the most recently used of its sort."""
        self.unpark(page)
        (self._cold if cold else self._idle)[page] = None

    def unpark(self, page: int) -> None:
        """A sequence takes a page up again; a page in use is not idle, and asking twice is fine."""
        self._idle.pop(page, None)
        self._cold.pop(page, None)

    def evict(self) -> int | None:
        """Forget the least recently used idle page, a cold one if there is one, and return it; None when every page
        is in use."""
        idle = self._cold or self._idle
        if not idle:
            return None
        page, _ = idle.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        return page

    def idle_pages(self) -> frozenset[int]:
        return frozenset((*self._idle, *self._cold))
