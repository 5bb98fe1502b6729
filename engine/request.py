"""A request, its choices, and the states a choice goes through.

waiting -> prefilling -> decoding -> finished
   ^____________|____________|          preemption: pages are swapped out, or dropped and computed again
"""

from dataclasses import dataclass, field

from engine.messages import FinishReason, Logprobs, Submit
from kvcache.recent import ReadRule


@dataclass(eq=False)
class Request:
    """What the choices of one Submit share."""

    submit: Submit
    order: int  # of arrival; ties in priority are served first come, first served
    seed: int  # the caller's, or drawn when the request came in
    rule: ReadRule | None = None  # what is read in high precision; None: what the cache's policy says
    prompt_logprobs: list[Logprobs] = field(default_factory=list)  # filled while the first choice prefills


@dataclass(eq=False)
class Sequence:
    """One choice: its tokens, and how many of them the cache has seen."""

    id: int  # the cache manager's name for it
    request: Request
    index: int  # of the choice
    tokens: list[int]  # prompt, then generated
    num_computed: int = 0  # tokens whose keys and values are stored
    num_cached_tokens: int = 0  # prompt tokens the first admission found in the cache
    num_preemptions: int = 0
    num_waiting_forks: int = 0  # choices that start from this one once its prompt is computed
    admitted_at: float | None = None  # time.monotonic()
    first_token_at: float | None = None
    finished: FinishReason | None = None
    is_left_to_cpu: bool = False  # its last token could not be drawn on the GPU: the next one may not be either

    @property
    def num_prompt(self) -> int:
        return len(self.request.submit.prompt)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def indices(self) -> tuple[int, ...]:
        """Of its own choice, and of those that are to start from it."""
        return (self.index, *range(1, self.num_waiting_forks + 1))

    @property
    def num_uncomputed(self) -> int:
        """Tokens to run before the next one can be sampled: 1 while decoding, more while prefilling."""
        return len(self.tokens) - self.num_computed

    @property
    def num_alike(self) -> int:
        """Those of them that one step may take: a prompt that attends in high precision ends with its step."""
        rule = self.request.rule
        if rule is None or self.num_computed >= rule.num_exact:
            return self.num_uncomputed
        return min(self.num_uncomputed, rule.num_exact - self.num_computed)

    @property
    def window(self) -> int | None:
        """Tokens that the next one to run reads in high precision; None: as many as the cache's policy says."""
        return None if self.request.rule is None else self.request.rule.window_at(self.num_computed)

    @property
    def is_decoding(self) -> bool:
        return self.num_uncomputed == 1 and self.num_generated > 0

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the logits of prompt rows are still wanted (the first choice collects them for all)."""
        sampling = self.request.submit.sampling
        return sampling.num_prompt_logprobs is not None and self.index == 0 and self.num_generated == 0

    @property
    def rank(self) -> tuple[int, int, int]:
        """Who goes first: lower is served earlier and preempted later."""
        return (self.request.submit.priority, self.request.order, self.index)
