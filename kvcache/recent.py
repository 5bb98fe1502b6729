"""Recent pages: the tokens that a sequence's next query reads in high precision, paged and shared like all others.

Recent page r of a sequence holds positions r R to r R + R - 1, R = RECENT_TOKENS. A sequence with n tokens stored holds
those that the read rule will ask for, and while a step runs those of the step's own rows. Complete ones are published
beside the page of the prefix that they belong to, under (its key, place in it), so that a prefix is found only together
with the window that its next token reads: a hit then computes what a miss computes, to the last bit.

The rule is a sequence's own: one that reads a longer window holds more of these pages, and shares them, and all others,
with sequences of the same rule only, because what a token's keys are depends on the windows that the layers below read.
One whose prompt attends in high precision throughout holds all of the prompt until it is computed. Its keys depend on
tokens alone until then, so that such sequences share prompts, whatever they read later, and nothing that follows.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from kernels.attention.quantized.layout import RECENT_TOKENS
from kvcache.tier import PageTier


@dataclass(frozen=True)
class ReadRule:
    """A query at position i reads key j in high precision iff i < num_exact or j < num_sinks or i - j < window. All 0:
    nothing is."""

    window: int = 0  # W tokens
    num_sinks: int = 0  # S tokens
    num_exact: int = 0  # tokens of a prompt that attends in high precision throughout; no step may cross its end

    @cached_property
    def num_sink_pages(self) -> int:
        return pages_for(self.num_sinks)

    @property
    def max_pages(self) -> int:
        """What a sequence needs at most to store and read one more token."""
        windowed = (pages_for(self.window - 1) + 1 if self.window else 0) + self.num_sink_pages
        return max(windowed, pages_for(self.num_exact))

    def after(self, num_stored: int) -> "ReadRule":
        """What the rule still asks for once `num_stored` tokens are stored."""
        return self if num_stored < self.num_exact else replace(self, num_exact=0)

    def window_at(self, position: int) -> int:
        """W of the query at this position."""
        return max(self.window, self.num_exact) if position < self.num_exact else self.window

    def is_useful(self, r: int, page_size: int) -> bool:
        """Whether the window of some page end, or the sinks, reach to page r: prefixes end at page ends only."""
        page_end = (r * RECENT_TOKENS // page_size + 1) * page_size
        return self.num_exact > 0 or r < self.num_sink_pages or r >= self.first_in_window(page_end)

    def of_prefix(self, num_tokens: int) -> list[int]:
        """The pages without which a prefix is not found: what its next token reads, be it the prompt's or not."""
        return [*range(pages_for(num_tokens))] if self.num_exact else self.before(num_tokens)

    def first_in_window(self, num_stored: int) -> int:
        """The first page that the query at position `num_stored` reads for its window."""
        if num_stored < self.num_exact:
            return 0
        return max(0, num_stored - self.window + 1) // RECENT_TOKENS if self.window else pages_for(num_stored)

    def before(self, num_stored: int) -> list[int]:
        """The pages that the query at position `num_stored` reads besides its own row: what is held between steps."""
        stop = pages_for(num_stored)
        sinks = range(min(self.num_sink_pages, stop))
        return [*sinks, *range(max(len(sinks), self.first_in_window(num_stored)), stop)]

    def written(self, num_stored: int, num_tokens: int) -> range:
        """The pages that a step of `num_tokens` writes."""
        stop = pages_for(num_stored + num_tokens)
        is_kept = self.window > 0 or num_stored < self.num_exact
        return range(num_stored // RECENT_TOKENS, stop if is_kept else min(stop, self.num_sink_pages))


def pages_for(num_tokens: int) -> int:
    return -(-num_tokens // RECENT_TOKENS)


def _is_complete(r: int, num_stored: int) -> bool:
    """Whether every row of page r is written."""
    return (r + 1) * RECENT_TOKENS <= num_stored


@dataclass
class Held:
    """What one sequence holds."""

    rule: ReadRule
    pages: dict[int, int]  # r -> recent page
    valued: frozenset[int] = frozenset()  # r of the prefixes that were looked up: others will look them up too
    num_stored: int = 0


@dataclass(frozen=True)
class Found:
    """The recent pages of a prefix. Valid until the next change."""

    pages: dict[int, int] = field(default_factory=dict)  # r -> recent page
    num_tokens: int = 0  # of the prefix
    num_wanted: int = 0  # tokens that full pages were found for; more than num_tokens where their window is gone


NOTHING = Found()


@dataclass(frozen=True)
class Occupancy:
    """What is on the recent pages now."""

    num_pages: int = 0
    num_used: int = 0  # pages held by sequences
    num_cached: int = 0  # pages held by the index alone
    num_tokens: int = 0  # stored on pages that sequences hold; shared ones count once


class RecentTier:
    """The recent pages of all sequences. Ids and counts only; the manager alone calls it.

    Idle pages are of two sorts. Where a sequence ended, and where one looked for a prefix, the next one will look
    again: those are kept as long as there is room, least recently used first out. The others lie at the ends of pages
    that a sequence only passed; they are cold, and all of them go before the first of the valued. Without the
    difference one long prompt would drive out the windows of all other prefixes.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self._page_size = page_size  # tokens
        self._per_page = page_size // RECENT_TOKENS
        self._tier = PageTier("recent page", num_pages)
        self._held: dict[int, Held] = {}

    @property
    def num_available(self) -> int:
        return self._tier.num_available

    @property
    def num_promised(self) -> int:
        """Pages that are not taken yet for the rest of prompts that attend in high precision."""
        reading = [held for held in self._held.values() if held.num_stored < held.rule.num_exact]
        return sum(max(0, pages_for(held.rule.num_exact) - len(held.pages)) for held in reading)

    @property
    def occupancy(self) -> Occupancy:
        num_used = self._tier.num_pages - self._tier.num_available
        missing = sum(
            RECENT_TOKENS - max(0, held.num_stored - r * RECENT_TOKENS)
            for held in self._held.values()
            for r in held.pages
            if not _is_complete(r, held.num_stored)  # such a page has one holder
        )
        return Occupancy(self._tier.num_pages, num_used, self._tier.index.num_idle, num_used * RECENT_TOKENS - missing)

    def table(self, sequence: int) -> dict[int, int]:
        """r -> recent page; the tier's own."""
        return self._held[sequence].pages

    def find(self, keys: Sequence[bytes], rule: ReadRule) -> Found:
        """The longest prefix of full pages named `keys` whose window and sinks are still there. Changes nothing."""
        for num_pages in range(self._num_unbroken(keys) if rule.num_exact else len(keys), 0, -1):
            pages: dict[int, int] = {}
            for r in reversed(rule.of_prefix(num_pages * self._page_size)):
                page = self._tier.index.find(self._key(keys, r))
                if page is None:
                    break
                pages[r] = page
            else:
                return Found(pages, num_pages * self._page_size, len(keys) * self._page_size)
        return Found(num_wanted=len(keys) * self._page_size)

    def _num_unbroken(self, keys: Sequence[bytes]) -> int:
        """How many of the full pages named `keys` have all their recent pages, and so have all before them."""
        for r in range(len(keys) * self._per_page):
            if self._tier.index.find(self._key(keys, r)) is None:
                return r // self._per_page
        return len(keys)

    def missing(self, found: Found, rule: ReadRule, num_tokens: int) -> int:
        """How many available pages a new sequence of `num_tokens` takes; a step's own rows can come in small parts."""
        most = min(rule.after(found.num_tokens).max_pages, pages_for(num_tokens))
        return max(0, most - len(found.pages)) + self._tier.num_idle(found.pages.values())

    def open(self, sequence: int, found: Found, rule: ReadRule) -> None:
        for page in found.pages.values():
            self._tier.hold(page)
        valued = frozenset(r for n in (found.num_tokens, found.num_wanted) for r in rule.of_prefix(n))
        self._held[sequence] = Held(rule, dict(found.pages), valued, found.num_tokens)

    def fitting(self, sequence: int, num_tokens: int) -> int:
        """As many of `num_tokens` as the available pages can take in one step, at least 1."""
        if len(self._new(sequence, num_tokens)) <= self.num_available:
            return num_tokens
        num_stored = self._held[sequence].num_stored
        most = (pages_for(num_stored) + self.num_available) * RECENT_TOKENS - num_stored
        return max(1, min(num_tokens, most))

    def extend(self, sequence: int, num_tokens: int) -> bool:
        """Take pages for the next `num_tokens` tokens. False, and nothing changed, when there are too few."""
        new = self._new(sequence, num_tokens)
        if len(new) > self.num_available:
            return False
        for r in new:
            self._held[sequence].pages[r] = self._tier.take()
        return True

    def commit(self, sequence: int, keys: Sequence[bytes], num_stored: int) -> None:
        """The first `num_stored` tokens are written and `keys` name their full pages (none: nothing is shared):
        publish what belongs to them and let go of what the next query does not read."""
        held, rule = self._held[sequence], self._held[sequence].rule
        first_key, held.num_stored = held.num_stored // self._page_size, num_stored
        for r in range(first_key * self._per_page, len(keys) * self._per_page):
            if r in held.pages and rule.is_useful(r, self._page_size):
                self._tier.index.insert(self._key(keys, r), held.pages[r])
        kept = rule.before(num_stored)
        page_end = num_stored // self._page_size * self._page_size
        first_warm = 0 if rule.num_exact else rule.first_in_window(page_end)
        for r in reversed([*held.pages]):  # the beginning of a prompt goes last
            if r not in kept:
                self._tier.drop(held.pages.pop(r), cold=r < first_warm and r not in held.valued)
        for r in self._idle_since(rule, first_key, first_warm, len(keys)):
            if r not in held.pages and r not in held.valued:
                self._park(self._key(keys, r), cold=True)

    def can_fork(self, parent: int) -> bool:
        """Whether there is a page for each that must be copied."""
        held = self._held[parent]
        return sum(not _is_complete(r, held.num_stored) for r in held.pages) <= self.num_available

    def fork(self, parent: int, child: int) -> list[tuple[int, int]]:
        """Give `child` what `parent` holds: complete pages shared, a started one copied: (from, to), at most one."""
        source = self._held[parent]
        held = self._held[child] = Held(source.rule, {}, source.valued, source.num_stored)
        copied = []
        for r, page in source.pages.items():
            if _is_complete(r, source.num_stored):
                self._tier.hold(page)
                held.pages[r] = page
            else:
                held.pages[r] = self._tier.take()
                copied.append((page, held.pages[r]))
        return copied

    def release(self, sequence: int, keys: Sequence[bytes]) -> None:
        """Let go of everything; what continues the sequence's last full page becomes the most recently used."""
        held = self._held.pop(sequence)
        for page in held.pages.values():
            self._tier.drop(page)
        if keys:
            for r in reversed(held.rule.of_prefix(len(keys) * self._page_size)):
                self._park(self._key(keys, r), cold=False)

    def image(self, sequence: int) -> Held:
        """What the sequence needs of its recent pages to go on later."""
        held = self._held[sequence]
        kept = held.rule.before(held.num_stored)
        return replace(held, pages={r: held.pages[r] for r in kept})

    def surviving(self, image: Held, keys: Sequence[bytes]) -> Found:
        """Those of an image that are still in the index; `keys` name the sequence's full pages. Changes nothing."""
        named = self._names(image, keys)
        found = {r: self._tier.index.find(key) for r, key in named.items() if key is not None}
        return Found({r: page for r, page in found.items() if page is not None}, image.num_stored)

    def reopen(self, sequence: int, image: Held, keys: Sequence[bytes]) -> list[tuple[int, int]]:
        """Go on from an image: (place in image.pages, page) of what must be written before the next step."""
        named = self._names(image, keys)
        pages, missing = self._tier.restore(list(named.values()))
        self._held[sequence] = replace(image, pages=dict(zip(named, pages, strict=True)))
        return [(i, pages[i]) for i in missing]

    def _names(self, image: Held, keys: Sequence[bytes]) -> dict[int, bytes | None]:
        """r -> the key of each page of the image, None where it has none."""
        names: dict[int, bytes | None] = {}
        for r in image.pages:
            is_shared = r < len(keys) * self._per_page and image.rule.is_useful(r, self._page_size)
            names[r] = self._key(keys, r) if is_shared else None
        return names

    def check(self) -> None:
        """Raise RuntimeError unless all pages are accounted for, every sequence holds just what its next query reads,
        and no page has two writers."""
        holders = self._tier.check(held.pages.values() for held in self._held.values())
        for sequence, held in self._held.items():
            needed = set(held.rule.before(held.num_stored))
            if not needed <= held.pages.keys():
                raise RuntimeError(f"sequence {sequence} lacks recent pages {sorted(needed - held.pages.keys())}")
            leaked = [r for r in held.pages if r not in needed and r < held.num_stored // RECENT_TOKENS]
            if leaked:
                raise RuntimeError(f"sequence {sequence} holds recent pages {leaked} that it will not read")
            for r, page in held.pages.items():
                if holders[page] > 1 and not _is_complete(r, held.num_stored):
                    raise RuntimeError(f"recent page {page} is shared and sequence {sequence} may write it")

    def _new(self, sequence: int, num_tokens: int) -> list[int]:
        """r of the pages that the next `num_tokens` tokens need and the sequence does not hold."""
        held = self._held[sequence]
        return [r for r in held.rule.written(held.num_stored, num_tokens) if r not in held.pages]

    def _idle_since(self, rule: ReadRule, first_key: int, first_warm: int, num_keys: int) -> Iterable[int]:
        """What stayed behind warm as the window of the page end before the last one, which now is one passed by."""
        if num_keys <= first_key:
            return ()
        return range(rule.first_in_window(first_key * self._page_size), min(first_warm, first_key * self._per_page))

    def _park(self, key: bytes, cold: bool) -> None:
        page = self._tier.index.find(key)
        if page is not None and self._tier.index.is_idle(page):
            self._tier.index.park(page, cold)

    def _key(self, keys: Sequence[bytes], r: int) -> bytes:
        return keys[r // self._per_page] + bytes((r % self._per_page,))
