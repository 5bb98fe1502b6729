"""The pool of pages: which are free, and how many sequences hold each of the others. Ids and counts only."""

from collections import deque


class PagePool:
    """Pages 0..num_pages-1. A page with a count of zero is free, or parked in the prefix index by the manager."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free: deque[int] = deque(range(num_pages))
        self._counts = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int | None:
        """Hand out a free page with a count of one, or None when there is none."""
        if not self._free:
            return None
        page = self._free.popleft()
        self._counts[page] = 1
        return page

    def acquire(self, page: int) -> None:
        """Add a holder to a page that is not free."""
        self._counts[page] += 1

    def release(self, page: int) -> int:
        """Drop a holder and return how many are left. At zero the caller must `free` the page or park it."""
        if self._counts[page] < 1:
            raise RuntimeError(f"page {page} was released more often than it was acquired")
        self._counts[page] -= 1
        return self._counts[page]

    def free(self, page: int) -> None:
        """Return a page nobody holds."""
        if self._counts[page] != 0:
            raise RuntimeError(f"page {page} was freed while {self._counts[page]} sequences hold it")
        self._free.append(page)

    def count(self, page: int) -> int:
        return self._counts[page]

    def free_pages(self) -> frozenset[int]:
        return frozenset(self._free)
