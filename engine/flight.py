"""Steps that are launched, and what is known of them before their ids are read."""

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

from torch import Tensor

from engine.batch import BatchRow, build_batch
from engine.request import Sequence
from engine.runner import Runner
from engine.sampling import Draw, Pending, Sampler, Target
from engine.scheduler import Slice


@dataclass(frozen=True)
class Part:
    """What one sequence has of a step."""

    item: Slice
    rows: range  # of the step's logits
    draws: range  # of the step's draws: one for each choice that draws, all from the last row
    targets: range  # of the prompt's tokens that the rows score

    @property
    def sequence(self) -> Sequence:
        return self.item.sequence


@dataclass(frozen=True)
class Flight:
    """A step that was launched, and whose ids nobody has read."""

    parts: Items[Part]
    logits: Tensor  # [num_logits, vocab] float32, of this step alone
    pending: Pending

    @property
    def is_apart(self) -> bool:
        """Whether it is computed while the host does something else."""
        return self.pending.ids is not None

    def settled(self) -> "Flight | None":
        """What is left of it once the ids of the step before are read; None: nothing."""
        parts = [p for p in self.parts if p.sequence.finished is None and not p.sequence.is_left_to_cpu]
        return replace(self, parts=parts) if parts else None


@dataclass(frozen=True)
class Before:
    """The ids of a step, which nobody has read."""

    ids: Tensor  # [num_draws] int32 on the device
    places: Mapping[int, int]  # sequence -> of its token among them


@dataclass(frozen=True)
class Launcher:
    """Slices to a step on its way."""

    runner: Runner
    sampler: Sampler
    page_size: int
    window: int  # tokens that the cache's policy reads in high precision
    eos_token_ids: tuple[int, ...]

    def launch(self, slices: Items[Slice], before: Before | None) -> Flight:
        """Run the model and draw from its logits what can be drawn where they are."""
        places = {} if before is None else before.places
        rows = [self._row(item, places.get(item.sequence.id)) for item in slices]
        ids = before.ids if before is not None and places else None  # none are drawn in the middle of a prompt
        logits = self.runner.run(build_batch(rows, ids))  # [num_logits, vocab]
        parts: list[Part] = []
        draws: list[tuple[int, Draw]] = []
        targets: list[Target] = []
        first = 0  # row of `logits`
        for item, row in zip(slices, rows, strict=True):
            own = range(first, first + row.num_logits)
            first = own.stop
            num_draws, num_targets = len(draws), len(targets)
            draws += self._draws(item, own, row.place)
            targets += _targets(item, own)
            parts.append(Part(item, own, range(num_draws, len(draws)), range(num_targets, len(targets))))
        return Flight(parts, logits, self.sampler.launch(logits, draws, targets, ids))

    def _row(self, item: Slice, place: int | None) -> BatchRow:
        sequence, size = item.sequence, self.page_size
        tokens = [0] if place is not None else sequence.tokens[item.start : item.start + item.num_tokens]
        num_logits = item.num_tokens if sequence.wants_prompt_logprobs else int(item.completes)
        window = None if sequence.window == self.window else sequence.window  # recorded steps know the policy's alone
        return BatchRow(tokens, item.start, item.block_table, size, num_logits, item.recent_table, window, place)

    def _draws(self, item: Slice, rows: range, last: int | None) -> list[tuple[int, Draw]]:
        """What the choices of a sequence that is caught up draw."""
        if not item.completes:
            return []
        sequence, eos = item.sequence, self.eos_token_ids
        return [(rows[-1], draw_of(sequence, index, eos, last)) for index in sequence.indices]


def draw_of(sequence: Sequence, index: int, eos_token_ids: tuple[int, ...], last: int | None = None) -> Draw:
    """The next token of a choice; last: the place of the one before it, if the step before draws it."""
    request, num_prompt = sequence.request, sequence.num_prompt
    return Draw(request.submit.sampling, request.seed, index, sequence.tokens, num_prompt, eos_token_ids, last)


def _targets(item: Slice, rows: range) -> list[Target]:
    """The row at position p scores the prompt token at p + 1."""
    if not item.sequence.wants_prompt_logprobs:
        return []
    submit = item.sequence.request.submit
    num_top = submit.sampling.num_prompt_logprobs or 0
    tokens = submit.prompt[item.start + 1 : item.start + item.num_tokens + 1]
    return [Target(row, token, num_top) for row, token in zip(rows, tokens, strict=False)]
