"""The only door to the cache's book-keeping: match, open, extend, commit, fork, release, check_integrity.

A sequence's tokens over its life, by who may touch the pages under them:

    [0, num_shared)            pages found in the index or forked: read only, shared
    [num_shared, num_stored)   written by this sequence; pages that are full are published and never change again
    [num_stored, capacity)     reserved by `extend`, written in the step that follows
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvcache.pages import PagePool
from kvcache.prefix import PrefixIndex, next_key, root_key


@dataclass(frozen=True)
class Match:
    """What the index holds of a prompt. Valid until the next call that changes the manager."""

    pages: tuple[int, ...]
    keys: tuple[bytes, ...]
    num_tokens: int  # = len(pages) * page_size


@dataclass(frozen=True)
class PageCopy:
    """The storage must copy page `source` to page `target` before the next step writes either."""

    source: int
    target: int


@dataclass
class _Held:
    """What one sequence holds."""

    block_table: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # one for each full page, published or met in the index
    num_stored: int = 0


class KVCacheManager:
    """Pages for sequences. Knows ids and counts, never tensors."""

    def __init__(self, num_pages: int, page_size: int, salt: str, sharing: bool = True) -> None:
        self.page_size = page_size
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self._sharing = sharing
        self._root = root_key(salt)
        self._pool = PagePool(num_pages)
        self._index = PrefixIndex()
        self._held: dict[int, _Held] = {}

    @property
    def num_pages(self) -> int:
        return self._pool.num_pages

    @property
    def num_available(self) -> int:
        """Pages a sequence could be given now: free ones and idle ones of the index."""
        return self._pool.num_free + self._index.num_idle

    @property
    def num_cached(self) -> int:
        """Pages held by the index alone."""
        return self._index.num_idle

    @property
    def num_used(self) -> int:
        """Pages held by sequences."""
        return self.num_pages - self.num_available

    def num_stored(self, sequence: int) -> int:
        return self._held[sequence].num_stored

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def match(self, tokens: Sequence[int]) -> Match:
        """Find the longest published prefix, leaving at least the last token to compute. Changes nothing."""
        pages: list[int] = []
        keys: list[bytes] = []
        key = self._root
        limit = (len(tokens) - 1) // self.page_size if self._sharing else 0
        for i in range(limit):
            key = next_key(key, tokens[i * self.page_size : (i + 1) * self.page_size])
            page = self._index.find(key)
            if page is None:
                break
            pages.append(page)
            keys.append(key)
        return Match(tuple(pages), tuple(keys), len(pages) * self.page_size)

    def missing(self, match: Match, num_tokens: int) -> int:
        """How many available pages a new sequence of `num_tokens` takes, given what `match` found: pages to fill,
        and idle pages that it would take out of the available ones."""
        idle = sum(self._index.is_idle(page) for page in match.pages)
        return self.pages_for(num_tokens) - len(match.pages) + idle

    def open(self, sequence: int, match: Match, num_queried: int) -> None:
        """Start a sequence on what `match` found. Of `num_queried` tokens looked up the metrics count the hits; 0
        leaves the metrics alone."""
        if sequence in self._held:
            raise RuntimeError(f"sequence {sequence} is open already")
        for page in match.pages:
            self._index.unpark(page)
            self._pool.acquire(page)
        self._held[sequence] = _Held(list(match.pages), list(match.keys), match.num_tokens)
        self.num_queried_tokens += num_queried
        self.num_hit_tokens += match.num_tokens if num_queried else 0

    def extend(self, sequence: int, num_tokens: int) -> list[int] | None:
        """Make room for `num_tokens` more tokens and return the block table, or None (nothing changed) when full."""
        held = self._held[sequence]
        num_new = self.pages_for(held.num_stored + num_tokens) - len(held.block_table)
        if num_new > self.num_available:
            return None
        held.block_table.extend(self._take() for _ in range(num_new))
        return held.block_table

    def commit(self, sequence: int, tokens: Sequence[int], num_stored: int) -> None:
        """Keys and values of the first `num_stored` of `tokens` are in the cache now: publish full pages."""
        held = self._held[sequence]
        held.num_stored = num_stored
        for i in range(len(held.keys), num_stored // self.page_size):
            key = next_key(
                held.keys[-1] if held.keys else self._root,
                tokens[i * self.page_size : (i + 1) * self.page_size],
            )
            held.keys.append(key)
            if self._sharing:
                self._index.insert(key, held.block_table[i])

    def fork(self, parent: int, child: int) -> list[PageCopy] | None:
        """Give `child` all that `parent` has stored: full pages shared, a started page copied.

        Returns the copies the storage must make (none or one), or None (nothing changed) when no page is left.
        """
        source = self._held[parent]
        num_full = source.num_stored // self.page_size
        partial = source.num_stored % self.page_size != 0
        if partial and self.num_available < 1:
            return None
        shared = source.block_table[:num_full]
        for page in shared:
            self._pool.acquire(page)
        held = _Held(list(shared), list(source.keys[:num_full]), source.num_stored)
        self._held[child] = held
        if not partial:
            return []
        held.block_table.append(self._take())
        return [PageCopy(source.block_table[num_full], held.block_table[num_full])]

    def release(self, sequence: int) -> None:
        """Let go of all pages of a sequence; published ones stay findable until evicted. Unknown ids are fine."""
        held = self._held.pop(sequence, None)
        if held is None:
            return
        for page in reversed(held.block_table):  # the tail goes first when room is needed: prefixes are worth more
            if self._pool.release(page) == 0:
                if self._index.holds(page):
                    self._index.park(page)
                else:
                    self._pool.free(page)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless free + held + idle pages are all pages and every count matches its holders."""
        holders = [0] * self.num_pages
        for held in self._held.values():
            if len(set(held.block_table)) != len(held.block_table):
                raise RuntimeError(f"a block table names a page twice: {held.block_table}")
            if held.num_stored > len(held.block_table) * self.page_size:
                raise RuntimeError(f"{held.num_stored} tokens are stored on {len(held.block_table)} pages")
            for page in held.block_table:
                holders[page] += 1
        free, idle = self._pool.free_pages(), self._index.idle_pages()
        for page, num_holders in enumerate(holders):
            if self._pool.count(page) != num_holders:
                raise RuntimeError(f"page {page} counts {self._pool.count(page)} holders and has {num_holders}")
            places = (page in free) + (page in idle) + (num_holders > 0)
            if places != 1:
                raise RuntimeError(f"page {page} is in {places} places: free, idle or held must be exactly one")
            if num_holders > 1 and not self._is_full(page):
                raise RuntimeError(f"page {page} is shared by {num_holders} sequences and one of them may write it")

    def _is_full(self, page: int) -> bool:
        """Whether the page is full for every holder, so that none writes it."""
        return all(
            held.block_table.index(page) < held.num_stored // self.page_size
            for held in self._held.values()
            if page in held.block_table
        )

    def _take(self) -> int:
        page = self._pool.take()
        if page is not None:
            return page
        evicted = self._index.evict()
        if evicted is None:
            raise RuntimeError("a page was promised but none is free or idle")
        self._pool.free(evicted)
        return self._take()
