"""transformers as the oracle: tiny checkpoints, their logits in float64, and how far float32 may stray from those.

The bound on our logits. Our forward pass and transformers' float32 one carry out the same real-number formula in
float32 and differ only in the order of their sums, so their errors against the float64 result are draws from one
distribution. The largest of transformers' errors over all positions and the whole vocabulary (thousands of draws)
measures its width; the largest of ours exceeds four times that only if we compute something else. A wrong formula
shows as 1e-3 and more where this bound is 1e-5.

"float64" needs two repairs in transformers: its RMSNorm computes in float32 whatever comes in, which `exact` replaces;
its angles are float32 by definition and stay so.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig

from engine.batch import BatchRow, build_batch
from engine.config import EngineConfig, Plan, resolve
from engine.loading import load_model, model_facts, open_checkpoint
from engine.models.decoder import Decoder
from engine.runner import Runner
from kernels.attention.f16.layout import keys_of, values_of
from kvcache.layout import PageLayout
from kvcache.policy import read_policy
from kvcache.storage import PageStorage

PAGE_SIZE = 16
NUM_PAGES = 24
TIMES_NOISE = 4
LENGTHS = (37, 23)  # of the two prompts every model is asked about: neither ends on a page edge


def new_model(config: PreTrainedConfig) -> Any:
    """A transformers model with weights of no account, whose attention runs in the dtype of its weights."""
    auto: Any = AutoModelForCausalLM
    return auto.from_config(config, attn_implementation="sdpa").eval()


def write_checkpoint(folder: Path, config: PreTrainedConfig, seed: int = 0) -> Any:
    """Save a random model under `config` and return it. Weights are large enough for attention to be selective."""
    model = new_model(config)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.2 if parameter.ndim == 1 else 2.0 * parameter.shape[-1] ** -0.5
            parameter.normal_(1.0 if "norm" in name else 0.0, scale, generator=random)
    model.save_pretrained(folder)
    return model


def exact(model: Any) -> Any:
    """Turn a transformers model into its float64 self, in place."""
    model.double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_exact_norm, module)
    return model


def _exact_norm(norm: Any, x: Tensor) -> Tensor:
    y: Tensor = norm.weight * x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    return y


class GivenCache(DynamicCache):
    """A cache that answers with given keys and values, and remembers what the model wanted to store.

    With the pages of our own run as answers, two implementations read the very same float16 numbers; what each would
    have rounded is compared apart. Otherwise a key near a rounding edge falls to either side and blurs the logits.
    """

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self._given = given  # per layer [2, num_kv_heads, n, head_dim]
        self.wanted: list[Tensor] = []  # likewise

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.wanted.append(torch.stack((key_states[0], value_states[0])))
        keys, values = self._given[layer_idx].to(key_states.dtype)
        return keys[None], values[None]


@dataclass(frozen=True)
class Answers:
    """What the oracle says about one prompt."""

    token_ids: list[int]  # [n]
    logits: Tensor  # [n, vocab] float64
    noise: float  # the largest error of transformers' float32 logits

    @property
    def bound(self) -> float:
        return TIMES_NOISE * self.noise


@dataclass(frozen=True)
class World:
    """One model, ours and theirs."""

    served: Decoder
    plan: Plan
    theirs: Any  # float32
    theirs_exact: Any  # float64
    answers: tuple[Answers, ...]  # one for each of LENGTHS


@torch.no_grad()
def make_world(folder: Path, theirs: Any, theirs_exact: Any) -> World:
    """Load the checkpoint in `folder` and ask transformers about it."""
    checkpoint = open_checkpoint(folder)
    exact = {"kv_policy": "f32", "activations": "float", "head_bits": 16}  # nothing is rounded on purpose
    config = EngineConfig(str(folder), page_size=PAGE_SIZE, kv_memory=1 << 30, **exact)  # type: ignore[arg-type]
    plan = resolve(config, model_facts(checkpoint, config))
    served = load_model(checkpoint, plan).model
    random = torch.Generator().manual_seed(5)
    answers = []
    for length in LENGTHS:
        ids = torch.randint(checkpoint.config.vocab_size, (1, length), generator=random)
        logits = theirs_exact(ids).logits[0]
        noise = (theirs(ids).logits[0].double() - logits).abs().max()
        answers.append(Answers(ids[0].tolist(), logits, float(noise)))
    return World(served, plan, theirs, theirs_exact, tuple(answers))


class Session:
    """A cache for one world, its unwritten slots full of NaN, its pages handed out in no order."""

    def __init__(self, world: World, policy: str = "f32") -> None:
        config = world.served.config
        layout = PageLayout(read_policy(policy), config.num_layers, config.num_kv_heads, config.head_dim, PAGE_SIZE)
        self.pages = PageStorage(layout, NUM_PAGES, torch.device("cpu")).layers
        for layer in self.pages:
            layer.fill_(torch.nan)
        self._runner = Runner(world.served, self.pages)
        self._free = torch.randperm(NUM_PAGES, generator=torch.Generator().manual_seed(9)).tolist()

    def table(self, num_tokens: int) -> list[int]:
        """Pages for a new sequence."""
        return [self._free.pop() for _ in range(-(-num_tokens // PAGE_SIZE))]

    def release(self, table: list[int]) -> None:
        """Pages to be handed out again next, as they are."""
        self._free += table

    def step(self, *rows: BatchRow) -> Tensor:
        """[num_logits, vocab]."""
        return self._runner.run(build_batch(rows))

    def run(self, token_ids: list[int], table: list[int], chunks: list[int], start: int = 0) -> Tensor:
        """One sequence, alone, in chunks: the logits of every row, [sum(chunks), vocab]."""
        logits = []
        for chunk in chunks:
            logits.append(self.step(BatchRow(token_ids[start : start + chunk], start, table, PAGE_SIZE, chunk)))
            start += chunk
        return torch.cat(logits)

    def stored(self, table: list[int], num_tokens: int) -> list[Tensor]:
        """What the pages hold of a sequence: per layer [2, num_kv_heads, num_tokens, head_dim]."""
        taken = [torch.stack((keys_of(layer[table]).mT, values_of(layer[table]))) for layer in self.pages]
        return [both.transpose(1, 2).flatten(2, 3)[:, :, :num_tokens] for both in taken]


def with_chunk(answers: Answers, start: int, chunk: int, table: list[int]) -> BatchRow:
    """A row of a batch that asks for all of its logits."""
    return BatchRow(answers.token_ids[start : start + chunk], start, table, PAGE_SIZE, chunk)


def without_logits(row: BatchRow, num_logits: int) -> BatchRow:
    return replace(row, num_logits=num_logits)


def exact_copy(model: nn.Module, config: PreTrainedConfig) -> Any:
    """A float64 copy of a transformers model."""
    copy = new_model(config)
    copy.load_state_dict(model.state_dict())
    return exact(copy)
