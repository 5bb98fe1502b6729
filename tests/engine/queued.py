"""A device that does nothing until somebody waits for it, as a GPU may: what is read too early is garbage.

It does what it is given in order. So what the host launched stays undone, whatever the host does meanwhile with pages,
tables and lists of tokens, until results of it are waited for; what was launched after those stays undone still.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from engine.batch import Batch
from engine.core import EngineCore, Parts
from engine.runner import Runner
from engine.sampling import Sampler
from kernels.contract import RowDraw, RowSpec, Scores, StepSamplingKernel
from kernels.sampling.reference import SamplingReference
from kernels.transfer import Fetch
from kvcache.manager import PageCopy
from kvcache.storage import PageStorage, SavedPages

GARBAGE = 10**6  # no id


@dataclass
class Device:
    """What was launched and is not done."""

    num_overlapped: int = 0  # waits that left something to do
    most_rows: int = 0  # of a step
    _todo: deque[Callable[[], Any]] = field(default_factory=deque)
    _num_done: int = 0

    def launch(self, job: Callable[[], Any]) -> int:
        """Returns what `run` takes to get this far."""
        self._todo.append(job)
        return self._num_done + len(self._todo)

    def run(self, until: int) -> None:
        while self._num_done < until:
            self._num_done += 1
            self._todo.popleft()()
        self.num_overlapped += bool(self._todo)

    def run_all(self) -> None:
        self.run(self._num_done + len(self._todo))


class QueuedRunner(Runner):
    def __init__(self, runner: Runner, vocab_size: int, device: Device) -> None:
        super().__init__(runner.model, runner.caches)
        self._runner, self._vocab_size, self._device = runner, vocab_size, device

    def run(self, batch: Batch) -> Tensor:
        logits = torch.full((len(batch.logit_rows), self._vocab_size), torch.nan)
        self._device.most_rows = max(self._device.most_rows, len(batch.input_ids))
        self._device.launch(lambda: logits.copy_(self._runner.run(batch)))
        return logits


@dataclass
class QueuedSampling:
    kernel: StepSamplingKernel
    device: Device
    name: str = "triton"

    def refuses(self, spec: RowSpec) -> str | None:
        return None

    def draw_all(self, logits: Tensor, draws: Sequence[RowDraw], before: Tensor | None = None) -> Tensor:
        ids = torch.full((len(draws),), GARBAGE, dtype=torch.int32)
        self.device.launch(lambda: ids.copy_(self.kernel.draw_all(logits, draws, before)))
        return ids

    def score_all(self, logits: Tensor, pairs: Sequence[tuple[int, int]], tokens: Tensor, num_top: int) -> Scores:
        num_top = min(num_top, logits.shape[1])
        ids, values = torch.full((len(pairs), 1 + num_top), GARBAGE), torch.zeros(len(pairs), 1 + num_top).double()

        def score() -> None:
            scores = self.kernel.score_all(logits, pairs, tokens, num_top)
            ids.copy_(scores.ids)
            values.copy_(scores.values)

        self.device.launch(score)
        return Scores(ids, values)


class QueuedFetch(Fetch):
    def __init__(self, tensors: Sequence[Tensor], device: Device) -> None:
        self._copies = [torch.full_like(tensor, GARBAGE) for tensor in tensors]
        self._device, self._until = device, device.launch(lambda: self._copy(tensors))

    def _copy(self, tensors: Sequence[Tensor]) -> None:
        for target, source in zip(self._copies, tensors, strict=True):
            target.copy_(source)

    def wait(self) -> list[Tensor]:
        self._device.run(self._until)
        return self._copies


class QueuedStorage(PageStorage):
    """The same pages, by way of the device."""

    def __init__(self, storage: PageStorage, device: Device) -> None:
        self.__dict__ |= vars(storage)
        self._storage, self._queue = storage, device

    def copy(self, copies: Sequence[PageCopy]) -> None:
        made = list(copies)
        self._queue.launch(lambda: self._storage.copy(made))

    def save(self, pages: Sequence[int], recent_pages: Sequence[int]) -> SavedPages:
        self._queue.run_all()
        return self._storage.save(pages, recent_pages)

    def load(self, saved: SavedPages, copies: Sequence[PageCopy]) -> None:
        made = list(copies)
        self._queue.launch(lambda: self._storage.load(saved, made))


def queued(parts: Parts, kernel: StepSamplingKernel, runner: Runner | None = None) -> tuple[EngineCore, Device]:
    """An engine whose steps run on such a device, drawn by `kernel`. runner: what runs them, once it is their turn."""
    device = Device()
    runner = runner or Runner(parts.runner.model, parts.runner.caches)
    moved = replace(
        parts,
        runner=QueuedRunner(runner, parts.vocab_size, device),
        storage=QueuedStorage(parts.storage, device),
        sampler=Sampler(
            SamplingReference(), QueuedSampling(kernel, device), lambda tensors: QueuedFetch(tensors, device)
        ),
    )
    return EngineCore(moved), device
