"""Pages of one kind: every page is free, held by sequences (counted), or idle in the prefix index."""

from collections.abc import Iterable, Sequence

from kvcache.pages import PagePool
from kvcache.prefix import PrefixIndex


class PageTier:
    """A pool and the index of what its pages hold. Ids and counts only."""

    def __init__(self, kind: str, num_pages: int) -> None:
        self.kind = kind  # as errors call it
        self.index = PrefixIndex()
        self._pool = PagePool(num_pages)

    @property
    def num_pages(self) -> int:
        return self._pool.num_pages

    @property
    def num_available(self) -> int:
        """Pages a sequence could be given now: free ones and idle ones of the index."""
        return self._pool.num_free + self.index.num_idle

    def num_idle(self, pages: Iterable[int]) -> int:
        """How many of `pages` would stop being available once someone holds them."""
        return sum(self.index.is_idle(page) for page in pages)

    def take(self) -> int:
        """A page to write. The caller has made sure that one is available."""
        page = self._pool.take()
        if page is not None:
            return page
        evicted = self.index.evict()
        if evicted is None:
            raise RuntimeError(f"a {self.kind} was promised but none is free or idle")
        self._pool.free(evicted)
        return self.take()

    def hold(self, page: int) -> None:
        """One more holder of a page that others hold or the index keeps."""
        self.index.unpark(page)
        self._pool.acquire(page)

    def restore(self, keys: Sequence[bytes | None]) -> tuple[list[int], list[int]]:
        """A held page for each key: the one that the index has, or else one to write, published under its key (None:
        nobody else may find it). Returns the pages, and the places of those to write in that list. The caller has made
        sure that enough are available."""
        found = [None if key is None else self.index.find(key) for key in keys]
        for page in found:  # all of them before the first is taken, which may evict one
            if page is not None:
                self.hold(page)
        pages = [self.take() if page is None else page for page in found]
        missing = [i for i, page in enumerate(found) if page is None]
        for i in missing:
            key = keys[i]
            if key is not None:
                self.index.insert(key, pages[i])
        return pages, missing

    def drop(self, page: int, cold: bool = False) -> None:
        """One holder less; a published page without any stays findable until evicted, a cold one not for long."""
        if self._pool.release(page) == 0:
            if self.index.holds(page):
                self.index.park(page, cold)
            else:
                self._pool.free(page)

    def check(self, tables: Iterable[Iterable[int]]) -> dict[int, int]:
        """Raise RuntimeError unless free, held and idle pages are all pages and counts match; returns the holders of
        each page that is held. tables: the pages of each sequence."""
        holders = [0] * self.num_pages
        for table in tables:
            held = list(table)
            if len(set(held)) != len(held):
                raise RuntimeError(f"a sequence holds a {self.kind} twice: {held}")
            for page in held:
                holders[page] += 1
        free, idle = self._pool.free_pages(), self.index.idle_pages()
        for page, num_holders in enumerate(holders):
            if self._pool.count(page) != num_holders:
                raise RuntimeError(f"{self.kind} {page} counts {self._pool.count(page)} holders and has {num_holders}")
            places = (page in free) + (page in idle) + (num_holders > 0)
            if places != 1:
                raise RuntimeError(f"{self.kind} {page} is in {places} places: free, idle or held must be exactly one")
        return {page: count for page, count in enumerate(holders) if count}
