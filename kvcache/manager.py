"""The only door to the cache's book-keeping: match, open, extend, commit, fork, release, check_integrity.

A sequence's tokens over its life, by who may touch the pages under them:

    [0, num_shared)            pages found in the index or forked: read only, shared
    [num_shared, num_stored)   written by this sequence; pages that are full are published and never change again
    [num_stored, capacity)     reserved by `extend`, written in the step that follows

Of the tokens that its next query reads in high precision it also holds the recent pages (kvcache/recent.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from kvcache.prefix import next_key, root_key
from kvcache.recent import NOTHING, Found, Occupancy, ReadRule, RecentTier
from kvcache.recent import Held as RecentHeld
from kvcache.tier import PageTier


@dataclass(frozen=True)
class Match:
    """What the index holds of a prompt. Valid until the next call that changes the manager."""

    pages: tuple[int, ...] = ()
    keys: tuple[bytes, ...] = ()
    num_tokens: int = 0  # = len(pages) * page_size
    rule: ReadRule | None = None  # that the sequence asks for; None: the cache's own
    recent: Found = NOTHING  # what the next token reads of them in high precision


@dataclass(frozen=True)
class PageCopy:
    """The storage must copy page `source` to page `target` before the next step writes either."""

    source: int
    target: int
    is_recent: bool = False  # both are recent pages


@dataclass(frozen=True)
class RecentSizes:
    """The recent pages beside the others."""

    num_pages: int
    rule: ReadRule  # of sequences that ask for no window of their own


@dataclass
class _Held:
    """What one sequence holds."""

    root: bytes  # what its first page's key follows
    block_table: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # one for each full page that can be shared
    num_stored: int = 0
    num_exact: int = 0  # tokens of a prompt that attends in high precision; what follows depends on where it ends

    @property
    def num_shareable(self) -> int:
        """Tokens stored whose keys and values are the same in every sequence that begins with them under this root."""
        return min(self.num_stored, self.num_exact) if self.num_exact else self.num_stored


@dataclass(frozen=True)
class Image:
    """What a sequence held when it was preempted: with the bytes of these pages it can go on later."""

    held: _Held
    recent_held: RecentHeld | None

    @property
    def pages(self) -> list[int]:
        """Ids at that time."""
        return self.held.block_table

    @property
    def recent_pages(self) -> list[int]:
        return [] if self.recent_held is None else [*self.recent_held.pages.values()]

    @property
    def num_stored(self) -> int:
        return self.held.num_stored


class KVCacheManager:
    """Pages for sequences. Knows ids and counts, never tensors."""

    def __init__(
        self, num_pages: int, page_size: int, salt: str, sharing: bool = True, recent: RecentSizes | None = None
    ) -> None:
        self.page_size = page_size
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self.num_cut_tokens = 0  # on published pages, and computed all the same: their window is gone
        self._sharing = sharing
        self._salt = salt
        self._tier = PageTier("page", num_pages)
        # None: nothing is quantized, and pages are all there is
        self._recent = None if recent is None else RecentTier(recent.num_pages, page_size)
        self._rule = ReadRule() if recent is None else recent.rule
        self._held: dict[int, _Held] = {}

    @property
    def num_pages(self) -> int:
        return self._tier.num_pages

    @property
    def num_available(self) -> int:
        """Pages a sequence could be given now: free ones and idle ones of the index."""
        return self._tier.num_available

    @property
    def num_recent_available(self) -> int:
        """Likewise of recent pages."""
        return 0 if self._recent is None else self._recent.num_available

    @property
    def num_cached(self) -> int:
        """Pages held by the index alone."""
        return self._tier.index.num_idle

    @property
    def num_used(self) -> int:
        """Pages held by sequences."""
        return self.num_pages - self.num_available

    @property
    def num_tokens_held(self) -> int:
        """Tokens stored on pages that sequences hold; shared ones count once: a page that is not full has one."""
        held = self._held.values()
        num_started = sum(len(one.block_table) - one.num_stored // self.page_size for one in held)
        in_started = sum(one.num_stored % self.page_size for one in held)
        return (self.num_used - num_started) * self.page_size + in_started

    @property
    def recent_occupancy(self) -> Occupancy:
        """What is on the recent pages."""
        return Occupancy() if self._recent is None else self._recent.occupancy

    def num_stored(self, sequence: int) -> int:
        return self._held[sequence].num_stored

    def recent_table(self, sequence: int) -> dict[int, int]:
        """position // RECENT_TOKENS -> recent page: the manager's own, read it before the next change."""
        return {} if self._recent is None else self._recent.table(sequence)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def match(self, tokens: Sequence[int], rule: ReadRule | None = None) -> Match:
        """Find the longest published prefix, leaving at least the last token to compute. Changes nothing.

        What the next token reads in high precision must be there too; otherwise a shorter prefix is taken. rule: what
        the sequence asks for, None for the cache's own; only prefixes computed with the same one are found.
        """
        pages: list[int] = []
        keys: list[bytes] = []
        key = self._root(rule)
        most = len(tokens) if rule is None or not rule.num_exact else min(len(tokens), rule.num_exact)
        limit = (most - 1) // self.page_size if self._sharing else 0
        for i in range(limit):
            key = next_key(key, tokens[i * self.page_size : (i + 1) * self.page_size])
            page = self._tier.index.find(key)
            if page is None:
                break
            pages.append(page)
            keys.append(key)
        if self._recent is None:
            return Match(tuple(pages), tuple(keys), len(pages) * self.page_size, rule)
        found = self._recent.find(keys, rule or self._rule)
        num_pages = found.num_tokens // self.page_size
        return Match(tuple(pages[:num_pages]), tuple(keys[:num_pages]), found.num_tokens, rule, found)

    def missing(self, match: Match, num_tokens: int) -> int:
        """How many available pages a new sequence of `num_tokens` takes, given what `match` found: pages to fill,
        and idle pages that it would take out of the available ones."""
        return self.pages_for(num_tokens) - len(match.pages) + self._tier.num_idle(match.pages)

    def has_room(self, match: Match, num_tokens: int, spare: int) -> bool:
        """Whether a new sequence of `num_tokens` fits and leaves `spare` pages of each kind."""
        if self.missing(match, num_tokens) + spare > self.num_available:
            return False
        if self._recent is None:
            return True
        missing = self._recent.missing(match.recent, match.rule or self._rule, num_tokens)
        return missing + spare + self._recent.num_promised <= self._recent.num_available

    def open(self, sequence: int, match: Match, num_queried: int) -> None:
        """Start a sequence on what `match` found. Of `num_queried` tokens looked up the metrics count the hits; 0
        leaves the metrics alone."""
        if sequence in self._held:
            raise RuntimeError(f"sequence {sequence} is open already")
        for page in match.pages:
            self._tier.hold(page)
        if self._recent is not None:
            self._recent.open(sequence, match.recent, match.rule or self._rule)
        num_exact = 0 if match.rule is None else match.rule.num_exact
        root = self._root(match.rule)
        self._held[sequence] = _Held(root, list(match.pages), list(match.keys), match.num_tokens, num_exact)
        self.num_queried_tokens += num_queried
        if num_queried:
            self.num_hit_tokens += match.num_tokens
            self.num_cut_tokens += max(0, match.recent.num_wanted - match.num_tokens)

    def fitting(self, sequence: int, num_tokens: int) -> int:
        """As many of the next `num_tokens` tokens as the recent pages can take in one step, at least 1."""
        return num_tokens if self._recent is None else self._recent.fitting(sequence, num_tokens)

    def extend(self, sequence: int, num_tokens: int) -> list[int] | None:
        """Make room for `num_tokens` more tokens and return the block table, or None (nothing changed) when full."""
        held = self._held[sequence]
        num_new = self.pages_for(held.num_stored + num_tokens) - len(held.block_table)
        if num_new > self.num_available:
            return None
        if self._recent is not None and not self._recent.extend(sequence, num_tokens):
            return None
        held.block_table.extend(self._tier.take() for _ in range(num_new))
        return held.block_table

    def commit(self, sequence: int, tokens: Sequence[int], num_stored: int) -> None:
        """Keys and values of the first `num_stored` of `tokens` are in the cache now: publish full pages."""
        held = self._held[sequence]
        held.num_stored = num_stored
        for i in range(len(held.keys), held.num_shareable // self.page_size):
            key = next_key(
                held.keys[-1] if held.keys else held.root,
                tokens[i * self.page_size : (i + 1) * self.page_size],
            )
            held.keys.append(key)
            if self._sharing:
                self._tier.index.insert(key, held.block_table[i])
        if self._recent is not None:
            self._recent.commit(sequence, self._shared_keys(held), num_stored)

    def fork(self, parent: int, child: int) -> list[PageCopy] | None:
        """Give `child` all that `parent` has stored: full pages shared, a started page copied.

        Returns the copies the storage must make (at most one of each kind), or None (nothing changed) when there is no
        page left for one.
        """
        source = self._held[parent]
        num_full = source.num_stored // self.page_size
        num_copied = min(1, source.num_stored % self.page_size)
        if num_copied > self.num_available or (self._recent is not None and not self._recent.can_fork(parent)):
            return None
        shared = source.block_table[:num_full]
        for page in shared:
            self._tier.hold(page)
        held = _Held(source.root, list(shared), list(source.keys[:num_full]), source.num_stored, source.num_exact)
        self._held[child] = held
        copies: list[PageCopy] = []
        if num_copied:
            held.block_table.append(self._tier.take())
            copies.append(PageCopy(source.block_table[num_full], held.block_table[num_full]))
        if self._recent is not None:
            copies += [PageCopy(*pair, is_recent=True) for pair in self._recent.fork(parent, child)]
        return copies

    def image(self, sequence: int) -> Image:
        """What must be kept of a sequence to go on without computing anything again; pages reserved for the step that
        it loses are left out. Valid until the next change."""
        held = self._held[sequence]
        stored = replace(held, block_table=held.block_table[: self.pages_for(held.num_stored)], keys=list(held.keys))
        return Image(stored, None if self._recent is None else self._recent.image(sequence))

    def surviving(self, image: Image) -> Match:
        """Pages of an image that the index still has: what `has_room` must know to let its sequence go on."""
        keys = self._shared_keys(image.held)
        found = [page for key in keys if (page := self._tier.index.find(key)) is not None]
        if self._recent is None or image.recent_held is None:
            return Match(tuple(found))
        recent = self._recent.surviving(image.recent_held, keys)
        return Match(tuple(found), rule=image.recent_held.rule, recent=recent)

    def reopen(self, sequence: int, image: Image) -> list[PageCopy]:
        """Go on from an image; the caller has asked `has_room`. Pages still in the index are shared. The storage must
        write the others before the next step: `source` counts image.pages or image.recent_pages."""
        keys = self._shared_keys(image.held)
        private = [None] * (len(image.pages) - len(keys))
        pages, missing = self._tier.restore([*keys, *private])
        self._held[sequence] = replace(image.held, block_table=pages, keys=list(image.held.keys))
        copies = [PageCopy(i, pages[i]) for i in missing]
        if self._recent is not None and image.recent_held is not None:
            pairs = self._recent.reopen(sequence, image.recent_held, keys)
            copies += [PageCopy(*pair, is_recent=True) for pair in pairs]
        return copies

    def _shared_keys(self, held: _Held) -> Sequence[bytes]:
        """Names of full pages under which others may find them."""
        return held.keys if self._sharing else ()

    def release(self, sequence: int) -> None:
        """Let go of all pages of a sequence; published ones stay findable until evicted. Unknown ids are fine."""
        held = self._held.pop(sequence, None)
        if held is None:
            return
        for page in reversed(held.block_table):  # the tail goes first when room is needed: prefixes are worth more
            self._tier.drop(page)
        if self._recent is not None:
            self._recent.release(sequence, self._shared_keys(held))

    def _root(self, rule: ReadRule | None) -> bytes:
        """What names the beginning of sequences with this rule."""
        if rule is None:
            return root_key(self._salt)
        return root_key(f"{self._salt}:exact" if rule.num_exact else f"{self._salt}:window {rule.window}")

    def check_integrity(self) -> None:
        """Raise RuntimeError unless free + held + idle pages are all pages, every count matches its holders, and no
        page has two writers; recent pages included."""
        holders = self._tier.check(held.block_table for held in self._held.values())
        for held in self._held.values():
            if held.num_stored > len(held.block_table) * self.page_size:
                raise RuntimeError(f"{held.num_stored} tokens are stored on {len(held.block_table)} pages")
            for page in held.block_table[held.num_stored // self.page_size :]:
                if holders[page] > 1:
                    raise RuntimeError(f"page {page} is shared by {holders[page]} sequences and one may write it")
        if self._recent is not None:
            self._recent.check()
