"""Who runs in this step, and how many tokens each. Ids and counts only, no tensors."""

from bisect import insort
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass

from engine.request import Sequence
from kvcache.manager import KVCacheManager, Match
from kvcache.swap import SwapSpace

MAX_SCORED_ROWS = 64  # prompt rows of one request with logits in one step: 39 MB at a vocabulary of 152,000


@dataclass(frozen=True)
class Slice:
    """`num_tokens` of a sequence, from `start`, run in this step."""

    sequence: Sequence
    start: int
    num_tokens: int
    block_table: list[int]  # the manager's own, as is recent_table: read them before the next change
    recent_table: dict[int, int]  # position // RECENT_TOKENS -> recent page

    @property
    def completes(self) -> bool:
        """Whether a token can be sampled afterwards: nothing of the sequence is left to compute. So it is after a token
        that nobody knows yet."""
        return self.start + self.num_tokens >= len(self.sequence.tokens)


class Scheduler:
    """Continuous batching. Decodes go first, one token each; prompts share what is left of the step's token budget.

    When pages run out the lowest-ranked running sequence gives its pages back and waits: to go on from the swap space
    if it has room, else to be computed again. A waiting sequence never takes pages from a running one.
    """

    def __init__(
        self, manager: KVCacheManager, max_num_seqs: int, max_batch_tokens: int, swap: SwapSpace | None = None
    ) -> None:
        self.num_preemptions = 0
        self._manager = manager
        self._swap = swap  # None: every preempted sequence is computed again
        self._max_num_seqs = max_num_seqs
        self._max_batch_tokens = max_batch_tokens
        self._waiting: list[Sequence] = []  # by rank
        self._running: list[Sequence] = []  # by rank

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def sequences(self) -> list[Sequence]:
        """Everything that is not finished."""
        return self._running + self._waiting

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. The caller has checked that it fits an empty cache."""
        insort(self._waiting, sequence, key=_rank)

    def adopt(self, sequence: Sequence) -> bool:
        """Run a fork that already holds its pages. False when there is no seat: the caller queues it instead."""
        if not self._has_seat:
            return False
        insort(self._running, sequence, key=_rank)
        return True

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it stands, and release its pages."""
        for queue in (self._running, self._waiting):
            if sequence in queue:
                queue.remove(sequence)
        self._manager.release(sequence.id)
        if self._swap is not None:
            self._swap.drop(sequence.id)

    def check_integrity(self) -> None:
        """Raise RuntimeError when pages or the swap space contradict themselves."""
        self._manager.check_integrity()
        if self._swap is not None:
            self._swap.check({sequence.id for sequence in self._waiting})

    def schedule(self) -> list[Slice]:
        """Choose this step's slices; reserves their pages, admits and preempts as needed."""
        slices: dict[int, Slice] = {}
        decoding = [s for s in self._running if s.is_decoding]
        prefilling = [s for s in self._running if not s.is_decoding]
        self._run(decoding + prefilling, slices)
        self._admit(slices)
        return list(slices.values())

    def ahead(self, sequences: Items[Sequence], num_ending: int, has_newcomers: bool) -> list[Slice] | None:
        """What `sequences` run next: more of a prompt, or one token more where all that is known of one is stored.
        `num_ending` others end now; has_newcomers: requests have come that are not queued yet.

        None where there is something to choose: another one runs, one waits or comes that may join the step, or pages
        run out. What was reserved until then stays with its sequence, for its next step.
        """
        if len(sequences) + num_ending != len(self._running):
            return None
        budget = self._max_batch_tokens - sum(sequence.num_uncomputed == 0 for sequence in sequences)
        slices: list[Slice] = []
        for sequence in sequences:
            num_tokens = 1
            if sequence.num_uncomputed:
                if budget == 0:
                    continue
                num_tokens = self._manager.fitting(sequence.id, _share(sequence, budget))
                budget -= num_tokens
            block_table = self._manager.extend(sequence.id, num_tokens)
            if block_table is None:
                return None
            slices.append(self._slice(sequence, num_tokens, block_table))
        if budget > 0 and self._may_seat(num_ending, has_newcomers):
            return None
        return slices

    def _may_seat(self, num_ending: int, has_newcomers: bool) -> bool:
        """Whether somebody may run who does not, once `num_ending` have ended and newcomers are queued."""
        if not num_ending and not self._has_seat:
            return False
        return has_newcomers or (bool(self._waiting) and (num_ending > 0 or self._has_room(self._waiting[0])))

    @property
    def _has_seat(self) -> bool:
        return len(self._running) < self._max_num_seqs

    def _run(self, sequences: Iterable[Sequence], slices: dict[int, Slice]) -> None:
        """Give running sequences their share, taking pages from the lowest-ranked when there are none left."""
        budget = self._max_batch_tokens
        preempted: set[int] = set()
        for sequence in sequences:
            if budget == 0:
                break
            if sequence.id in preempted:
                continue  # it gave its pages to a better-ranked one a moment ago
            num_tokens = self._manager.fitting(sequence.id, _share(sequence, budget))
            while (block_table := self._manager.extend(sequence.id, num_tokens)) is None:
                victim = self._running[-1]
                preempted.add(victim.id)
                self._preempt(victim)
                slices.pop(victim.id, None)
                if victim is sequence:
                    break
            if block_table is not None:
                slices[sequence.id] = self._slice(sequence, num_tokens, block_table)
                budget -= num_tokens

    def _admit(self, slices: dict[int, Slice]) -> None:
        """Start waiting sequences, best rank first, while the step has budget and the cache has room."""
        budget = self._max_batch_tokens - sum(item.num_tokens for item in slices.values())
        while self._waiting and budget > 0 and self._has_seat:
            sequence = self._waiting[0]
            if not self._has_room(sequence):
                return
            self._open(sequence)
            self._waiting.pop(0)
            insort(self._running, sequence, key=_rank)
            num_tokens = self._manager.fitting(sequence.id, _share(sequence, budget))
            block_table = self._manager.extend(sequence.id, num_tokens)
            if block_table is None:
                raise RuntimeError("a sequence was admitted that the empty cache cannot hold")
            slices[sequence.id] = self._slice(sequence, num_tokens, block_table)
            budget -= num_tokens

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence can start and leaves enough to those that run; alone it always can."""
        if not self._running:
            return True
        num_tokens, spare = len(sequence.tokens), len(self._running)  # a running sequence may want one more page soon
        if self._swap is not None and sequence.id in self._swap:
            return self._swap.has_room(sequence.id, num_tokens, spare)
        return self._manager.has_room(self._find_prefix(sequence), num_tokens, spare)

    def _open(self, sequence: Sequence) -> None:
        """Give a waiting sequence the pages that the swap space or the prefix index has of it."""
        if self._swap is not None and sequence.id in self._swap:
            sequence.num_computed = self._swap.take(sequence.id)
            return
        match = self._find_prefix(sequence)
        is_new = sequence.num_preemptions == 0  # finding one's own pages again is no hit
        self._manager.open(sequence.id, match, num_queried=len(sequence.tokens) if is_new else 0)
        sequence.num_computed = match.num_tokens
        if is_new:
            sequence.num_cached_tokens = match.num_tokens

    def _find_prefix(self, sequence: Sequence) -> Match:
        """Prompt log-probabilities need every prompt row computed, so those requests take nothing from the cache."""
        if sequence.wants_prompt_logprobs:
            return Match(rule=sequence.request.rule)
        return self._manager.match(sequence.tokens, sequence.request.rule)

    def _slice(self, sequence: Sequence, num_tokens: int, block_table: list[int]) -> Slice:
        recent_table = self._manager.recent_table(sequence.id)
        return Slice(sequence, sequence.num_computed, num_tokens, block_table, recent_table)

    def _preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's pages. The step has written nothing yet, so that they hold what it has stored."""
        self._running.remove(sequence)
        swapped = self._swap is not None and self._swap.put(sequence.id)
        self._manager.release(sequence.id)
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        if sequence.wants_prompt_logprobs and not swapped:
            sequence.request.prompt_logprobs.clear()
        self.num_preemptions += 1
        self.add(sequence)


def _share(sequence: Sequence, budget: int) -> int:
    """Tokens of the sequence to run: what is left of the budget, less where every row's logits are wanted."""
    limit = MAX_SCORED_ROWS if sequence.wants_prompt_logprobs else budget
    return min(budget, limit, sequence.num_alike)


def _rank(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.rank
