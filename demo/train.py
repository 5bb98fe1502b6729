"""Train the demo model: `python -m demo.train --books DIR --out RUN --minutes 90`. Resumes from RUN when it exists."""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from demo import books as library
from demo import circuits, muon, tokenizer
from demo.cases import recall_case, score
from demo.mixture import FIRST, Mixture, Stage, stage_at
from demo.model import DemoModel, ModelConfig

PROBES = (16, 64, 256, 512, 1024, 2048, 4000)  # tokens
MICRO_TOKENS = 2048  # tokens per forward pass on a CPU: activations stay near the caches
Z_WEIGHT = 1e-4
DECAY = 0.45  # share of the part before the drill over which the learning rates fall to zero
RESTART = 0.5  # of the peak rates, at the start of the drill


@dataclass(frozen=True)
class Options:
    """What a run is told."""

    out: Path
    books: Path | None
    minutes: float
    seed: int
    device: str
    compile: bool
    workers: int  # processes of one thread each that share every step; 1 uses all threads


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    log: list[dict[str, float]] = field(default_factory=list)
    probes: list[dict[str, float]] = field(default_factory=list)


def rate(share: float) -> float:
    """Learning rate as a share of its peak: constant, then a linear decay to zero; a second decay in the drill."""
    if share < FIRST:
        return min(1.0, (1.0 - share / FIRST) / DECAY)
    return RESTART * max(0.0, (1.0 - share) / (1.0 - FIRST))


def prepare_tokenizer(options: Options) -> None:
    """Train the tokenizer of the run at its first start."""
    if not (options.out / "tokenizer.json").exists():
        vocabulary = tokenizer.train(library.load(options.books), ModelConfig().vocab_size, options.seed)
        tokenizer.save(vocabulary, options.out)


class Run:
    """Model, optimizers, data and progress of one training run."""

    def __init__(self, options: Options, rank: int) -> None:
        self.options, self.rank = options, rank
        self.books = library.load(options.books)
        torch.manual_seed(options.seed)
        self.model = DemoModel(ModelConfig())
        circuits.plant(self.model, options.seed)
        self.model.to(options.device)
        self.optimizers = muon.build(self.model, muon_lr=0.01, adam_lr=0.0015)
        self.peaks = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
        self.progress = Progress()
        self.tokenizer = Tokenizer.from_file(str(options.out / "tokenizer.json"))
        self.resume()
        seed = options.seed + 1 + self.progress.step * options.workers + rank
        self.mixture = Mixture(self.tokenizer, self.books, seed, options.workers)
        self.loss = torch.compile(self.model.loss, dynamic=False) if options.compile else self.model.loss

    def resume(self) -> None:
        """Continue from the last checkpoint, if there is one."""
        path = self.options.out / "state.pt"
        if path.exists():
            state = torch.load(path, map_location=self.options.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.progress = Progress(**state["progress"])

    def save(self) -> None:
        """Write the checkpoint (atomically) and the log."""
        if self.rank:
            return
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": asdict(self.progress),
        }
        torch.save(state, self.options.out / "state.new")
        (self.options.out / "state.new").replace(self.options.out / "state.pt")
        (self.options.out / "log.json").write_text(json.dumps(asdict(self.progress)))

    def step(self, stage: Stage, batch: tuple[Tensor, Tensor], share: float) -> tuple[float, float]:
        """One update over a batch in micro-batches; returns (weighted loss, plain loss per token)."""
        ids, weights = (part.to(self.options.device) for part in batch)
        rows = max(1, MICRO_TOKENS // stage.row) if self.options.device == "cpu" else len(ids)
        norm = weights[:, 1:].sum()
        weighted = plain = 0.0
        for start in range(0, len(ids), rows):
            part = slice(start, start + rows)
            with torch.autocast(self.options.device, torch.bfloat16):
                total, every = self.loss(ids[part], weights[part], Z_WEIGHT)
            (total / norm).backward()  # type: ignore[no-untyped-call]
            weighted += float(total.detach() / norm)
            plain += float(every)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        muon.share(gradients)
        torch._foreach_div_(gradients, float(self.options.workers))
        warm = min(1.0, (self.progress.step + 1) / 100)
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * rate(share) * warm
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return weighted, plain / (ids.numel() - len(ids))

    @torch.no_grad()
    def probe(self) -> None:
        """Log recall by distance on held-out facts, a few cases each."""
        if self.rank:
            return
        rng = random.Random(self.options.seed)
        found = {"step": float(self.progress.step)}
        for distance in PROBES:
            cases = [recall_case(rng, self.tokenizer, self.books, distance, "held_out") for _ in range(8)]
            with torch.autocast(self.options.device, torch.bfloat16):
                found[str(distance)] = score(lambda ids: self.model(ids.to(self.options.device)).cpu(), cases, 1)
        self.progress.probes.append(found)
        sys.stderr.write(f"\n{json.dumps(found)}\n")

    def train(self) -> None:
        """Run until the time is used up; a checkpoint and a probe every few minutes."""
        p, budget = self.progress, self.options.minutes * 60
        began = time.monotonic() - p.seconds
        saved = probed = p.seconds
        stage = stage_at(self.agree(p.seconds / budget), p.step + 1)
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self.mixture.batch, stage)
            while (done := self.agree((time.monotonic() - began) / budget)) < 1.0:
                batch, current = ahead.result(), stage
                stage = stage_at(done, p.step + 2)
                ahead = pool.submit(self.mixture.batch, stage)
                weighted, plain = self.step(current, batch, done)
                p.step += 1
                p.tokens += batch[0].numel() * self.options.workers
                p.seconds = done * budget
                if self.rank == 0:
                    self.report(done, current, weighted, plain)
                if p.seconds - saved > 120:
                    saved = p.seconds
                    self.save()
                if p.seconds - probed > 240:
                    probed = p.seconds
                    self.probe()
        self.probe()
        self.save()

    def agree(self, value: float) -> float:
        """The value of process 0, known to all."""
        told = torch.tensor([value], dtype=torch.float64)
        if dist.is_initialized():
            dist.broadcast(told, 0)
        return float(told)

    def report(self, done: float, stage: Stage, weighted: float, plain: float) -> None:
        """Log a step and redraw the progress bar (a line every 20 steps where stderr is a file)."""
        p = self.progress
        p.log.append({"step": p.step, "tokens": p.tokens, "row": stage.row, "weighted": weighted, "plain": plain})
        terminal = sys.stderr.isatty()
        if terminal or p.step % 20 == 0:
            bar = f"[{'#' * int(done * 30):<30}] {done:4.0%} step {p.step} row {stage.row}"
            rest = f" loss {weighted:.3f} ({plain:.3f}) {p.tokens / 1e6:.2f} M tokens, {p.seconds / 60:.1f} min"
            sys.stderr.write(f"{chr(13) if terminal else ''}{bar}{rest}{'' if terminal else chr(10)}")
            sys.stderr.flush()


def work(rank: int, options: Options) -> None:
    """One process of the run."""
    if options.workers > 1:
        torch.set_num_threads(1)
        meeting = f"file://{(options.out / 'meeting').resolve()}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=options.workers)
    Run(options, rank).train()


def main() -> None:
    """Parse the flags and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; resumed when it holds one")
    parser.add_argument("--books", type=Path, default=None, help="folder of public-domain books (*.txt)")
    parser.add_argument("--minutes", type=float, default=90, help="training time over all resumes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each (CPU)")
    options = Options(**vars(parser.parse_args()))
    options.out.mkdir(parents=True, exist_ok=True)
    prepare_tokenizer(options)
    (options.out / "meeting").unlink(missing_ok=True)
    if options.workers == 1:
        work(0, options)
    else:
        spawn(work, (options,), options.workers)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
