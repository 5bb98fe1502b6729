"""Preempted sequences in host memory: their pages are copied out, and back when they go on.

What comes back is what went out, so a sequence that was swapped computes what it would have computed without. The
budget is in bytes. What finds no room is computed again.
"""

from collections.abc import Collection
from dataclasses import dataclass

from kvcache.manager import Image, KVCacheManager
from kvcache.storage import PageStorage, SavedPages


@dataclass(frozen=True)
class _Swapped:
    """One sequence."""

    image: Image
    saved: SavedPages


class SwapSpace:
    """The sequences that are swapped out, and what swapping has done so far."""

    def __init__(self, num_bytes: int, manager: KVCacheManager, storage: PageStorage) -> None:
        self.num_bytes = num_bytes  # at most; 0: nothing is ever swapped
        self.num_used_bytes = 0
        self.num_out = 0  # sequences
        self.num_in = 0
        self.num_bytes_out = 0  # copied
        self.num_bytes_in = 0
        self._manager = manager
        self._storage = storage
        self._swapped: dict[int, _Swapped] = {}

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._swapped

    def put(self, sequence: int) -> bool:
        """Copy what the sequence has stored. False, and nothing changed, when it has nothing or there is no room. The
        caller releases its pages next."""
        image = self._manager.image(sequence)
        num_bytes = self._size(image)
        if num_bytes == 0 or num_bytes > self.num_bytes - self.num_used_bytes:
            return False
        self._swapped[sequence] = _Swapped(image, self._storage.save(image.pages, image.recent_pages))
        self.num_used_bytes += num_bytes
        self.num_out += 1
        self.num_bytes_out += num_bytes
        return True

    def has_room(self, sequence: int, num_tokens: int, spare: int) -> bool:
        """Whether a swapped sequence can go on, `num_tokens` long, and leaves `spare` pages of each kind."""
        return self._manager.has_room(self._manager.surviving(self._swapped[sequence].image), num_tokens, spare)

    def take(self, sequence: int) -> int:
        """Give a sequence its pages back; the caller has asked `has_room`. Returns how many tokens they hold."""
        swapped = self._swapped[sequence]
        copies = self._manager.reopen(sequence, swapped.image)
        self._storage.load(swapped.saved, copies)
        self.num_in += 1
        layout = self._storage.layout
        for copy in copies:
            self.num_bytes_in += layout.bytes_per_recent_page if copy.is_recent else layout.bytes_per_page
        self.drop(sequence)
        return swapped.image.num_stored

    def drop(self, sequence: int) -> None:
        """Forget a sequence. Those that are not swapped are fine."""
        swapped = self._swapped.pop(sequence, None)
        if swapped is not None:
            self.num_used_bytes -= self._size(swapped.image)

    def check(self, waiting: Collection[int]) -> None:
        """Raise RuntimeError unless just sequences that wait are swapped, and the bytes are theirs."""
        if not self._swapped.keys() <= set(waiting):
            raise RuntimeError(f"sequences {sorted(self._swapped.keys() - set(waiting))} are swapped and do not wait")
        num_bytes = sum(swapped.saved.num_bytes for swapped in self._swapped.values())
        if not num_bytes == self.num_used_bytes <= self.num_bytes:
            raise RuntimeError(
                f"{num_bytes} bytes are swapped, {self.num_used_bytes} counted, {self.num_bytes} allowed"
            )

    def _size(self, image: Image) -> int:
        layout = self._storage.layout
        return len(image.pages) * layout.bytes_per_page + len(image.recent_pages) * layout.bytes_per_recent_page
