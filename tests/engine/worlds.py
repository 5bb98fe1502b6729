"""The smallest engine that can be wrong: a model that reads its whole context through the block tables."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.batch import Batch
from engine.config import Plan
from engine.core import EngineCore, Parts
from engine.messages import Done, Event, Failed, Inbound, PlanSummary, Sampling, Submit, Token
from engine.runner import Runner
from engine.sampling import Sampler
from kernels.contract import RowSpec
from kernels.sampling import KERNELS
from kvcache.layout import PageLayout
from kvcache.manager import KVCacheManager
from kvcache.policy import read_policy
from kvcache.storage import PageStorage

SAMPLER = Sampler(next(k for k in KERNELS if k.refuses(RowSpec(1, torch.device("cpu"), torch.float32)) is None))
VOCAB = 50
EOS = 0


class HashModel:
    """The next token is a hash of every token before it, as found on the pages: a wrong page changes the answer."""

    def forward(self, batch: Batch, pages: Sequence[Tensor]) -> Tensor:
        page_size = pages[0].shape[3]
        seen = pages[0].view(pages[0].shape[0], 2, -1)[:, 0, :page_size]  # [num_pages, page_size], a view: one number
        starts = batch.attention.query_starts
        slots = batch.attention.slots
        seen[slots // page_size, slots % page_size] = batch.input_ids.to(seen.dtype)
        logits = []
        for i, context_len in enumerate(batch.attention.context_lens):
            context = seen[batch.attention.block_tables[i]].flatten()[:context_len].long().tolist()
            num_rows = starts[i + 1] - starts[i]
            logits += [hash_logits(context[: context_len - num_rows + r + 1]) for r in range(num_rows)]
        return torch.stack(logits)[batch.logit_rows] if len(batch.logit_rows) else torch.zeros(0, VOCAB)


def hash_logits(context: list[int]) -> Tensor:
    """[VOCAB] float32, fixed by the context alone; the end token is never the likeliest."""
    generator = torch.Generator().manual_seed(hash(tuple(context)) % 2**31)
    logits = torch.randn(VOCAB, generator=generator)
    logits[EOS] = -5.0
    return logits


def continuation(prompt: list[int], num_tokens: int) -> list[int]:
    """What greedy decoding of HashModel must give."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(hash_logits(tokens).argmax()))
    return tokens[len(prompt) :]


def make_core(
    num_pages: int = 32, max_num_seqs: int = 8, max_batch_tokens: int = 16, page_size: int = 16
) -> EngineCore:
    """An engine around HashModel."""
    layout = PageLayout(read_policy("f32"), num_layers=1, num_kv_heads=1, head_dim=1, page_size=page_size)
    storage = PageStorage(layout, num_pages, torch.device("cpu"))
    plan = Plan(
        device="cpu",
        kernel=None,
        kv_policy="f32",
        page_size=page_size,
        num_pages=num_pages,
        max_model_len=num_pages * page_size,
        max_num_seqs=max_num_seqs,
        max_batch_tokens=max_batch_tokens,
        prefix_caching=True,
        threads=1,
        activations="int8",
        head_bits=8,
    )
    manager = KVCacheManager(num_pages, page_size, salt="test")
    runner = Runner(HashModel(), storage.layers)
    return EngineCore(Parts(plan, runner, storage, manager, SAMPLER, VOCAB, eos_token_ids=(EOS,)))


def make_summary(core: EngineCore) -> PlanSummary:
    """What such an engine would say of itself."""
    return PlanSummary(
        model="hash",
        architecture="HashModel",
        format="none",
        device="cpu",
        dtype="float32",
        kernels=[],
        kv_policy="f32",
        page_size=16,
        num_pages=core.stats().pages_total,
        kv_bytes_per_token=8,
        weight_bytes=0,
        max_model_len=core.stats().pages_total * 16,
        max_num_seqs=8,
        max_batch_tokens=16,
        prefix_caching=True,
        threads=1,
        vocab_size=VOCAB,
        load_seconds=0.0,
        decode_tokens_per_s=0.0,
        eos_token_ids=(EOS,),
    )


def submit(request_id: str, prompt: list[int], n: int = 1, priority: int = 0, **sampling: object) -> Submit:
    """A greedy request unless told otherwise."""
    values = {"max_tokens": 8, "temperature": 0.0, **sampling}
    return Submit(request_id, prompt, Sampling(**values), arrival=0.0, n=n, priority=priority)  # type: ignore[arg-type]


def run(core: EngineCore, inbox: Sequence[Inbound], max_steps: int = 3000) -> list[Event]:
    """Step until idle, checking the invariants after every step; returns all events."""
    events = core.step(list(inbox))
    for _ in range(max_steps):
        core.check_integrity()
        if not core.has_work:
            break
        events += core.step([])
    assert not core.has_work
    assert core.stats().pages_used == 0
    return events


def tokens_of(events: Sequence[Event], request_id: str, index: int = 0) -> list[int]:
    return [e.token for e in events if isinstance(e, Token) and (e.id, e.index) == (request_id, index)]


def endings(events: Sequence[Event], request_id: str) -> list[Done | Failed]:
    return [e for e in events if isinstance(e, Done | Failed) and e.id == request_id]
