"""Engines over caches of any policy, for tests that no schedule changes a bit of what a request gets."""

from dataclasses import dataclass, replace

import msgspec
import torch

from engine.assembly import make_manager
from engine.config import RECENT_TOKENS
from engine.core import EngineCore, Parts
from engine.messages import Event, Logprobs, PromptLogprobs, Submit, Token
from kvcache.layout import PageLayout
from tests.engine.worlds import run, submit

MAX_LEN = 192  # tokens of a sequence


@dataclass(frozen=True)
class World:
    """One model with the cache of one policy."""

    parts: Parts
    scorer: Parts  # the same with a cache of its own

    @property
    def layout(self) -> PageLayout:
        return self.parts.storage.layout

    def core(
        self,
        max_batch_tokens: int = 64,
        num_sequences: int = 8,
        spare_recent: int | None = None,
        max_num_seqs: int = 8,
        swap_sequences: int = 0,
    ) -> EngineCore:
        """An engine over a cache full of NaN, with pages for `num_sequences` of MAX_LEN tokens, and with as few recent
        pages as one sequence needs, and `spare_recent`. It can swap `swap_sequences` out that are that long."""
        poison(self.parts)
        rule, plan = self.layout.read_rule, self.parts.plan
        least = 0 if rule is None else rule.max_pages
        if plan.kv_prefill == "exact":
            least = max(least, MAX_LEN // RECENT_TOKENS)
        page_bytes, recent_bytes = self.layout.bytes_per_page, self.layout.bytes_per_recent_page
        swapped_bytes = MAX_LEN // plan.page_size * page_bytes + least * recent_bytes
        plan = msgspec.structs.replace(
            plan,
            num_pages=min(plan.num_pages, num_sequences * MAX_LEN // plan.page_size),
            num_recent_pages=plan.num_recent_pages if spare_recent is None else least + spare_recent,
            max_batch_tokens=max_batch_tokens,
            max_num_seqs=max_num_seqs,
            swap_bytes=swap_sequences * swapped_bytes,
        )
        return EngineCore(replace(self.parts, plan=plan, manager=make_manager(plan, self.layout, "test")))

    def scores(self, tokens: list[int], num_prompt: int) -> list[Logprobs]:
        """The log-probabilities of tokens[num_prompt:], read as a prompt by an engine that has done nothing else."""
        poison(self.scorer)
        manager = make_manager(self.scorer.plan, self.layout, "score")
        request = submit("score", tokens, max_tokens=0, num_prompt_logprobs=3)
        events = run(EngineCore(replace(self.scorer, manager=manager)), [request])
        (event,) = (e for e in events if isinstance(e, PromptLogprobs))
        return event.entries[num_prompt - 1 :]


def poison(parts: Parts) -> None:
    """Fill the cache with NaN, or what decodes to it."""
    for layer in parts.storage.layers:
        if isinstance(layer, torch.Tensor):
            layer.fill_(torch.nan)
        else:
            layer.pages.fill_(0x7F)
            layer.recent.fill_(torch.nan)


def prompt_of(which: int, num_shared: int, num_own: int) -> list[int]:
    """A beginning that others have too, and something of its own."""
    shared = [(7 * i * i + 3 * i + which) % 61 for i in range(num_shared)]
    return shared + [(i + 5 * num_own + 31 * which) % 61 for i in range(num_own)]


def seeded(request_id: str, prompt: list[int], max_tokens: int = 8, n: int = 1, priority: int = 0) -> Submit:
    wishes = {"temperature": 1.0, "seed": len(prompt), "num_logprobs": 3, "ignore_eos": True}
    return submit(request_id, prompt, n=n, priority=priority, max_tokens=max_tokens, **wishes)


def check(world: World, request: Submit, events: list[Event]) -> None:
    """Every choice of the request, to the last bit."""
    for index in range(request.n):
        found = [e for e in events if isinstance(e, Token) and (e.id, e.index) == (request.id, index)]
        tokens = [*request.prompt, *(e.token for e in found)]
        assert len(found) == request.sampling.max_tokens
        assert [e.logprobs for e in found] == world.scores(tokens, len(request.prompt))
