"""The sections of the report: policies, windows and sinks, ingredients, outliers, and the order of rounding."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.kv_quality import errors, texts
from benchmarks.kv_quality.altered import Dropping, Scaling, outliers
from benchmarks.kv_quality.measure import PLAIN, Reader, Readings, compared, find, standard_error
from benchmarks.kv_quality.scoring import Engine, Subject, mean
from engine.assembly import StartError
from engine.calibration.run import calibrate
from engine.config import Prefill
from engine.loading import open_checkpoint
from engine.messages import CalibrationSettings
from kernels.attention.quantized.codec import RowCodec, default_clip, prescale_for
from kernels.attention.quantized.layout import RowLayout
from kernels.attention.quantized.transforms import Hadamard
from kvcache.calibration import CalibrationError
from kvcache.policy import LayerPolicy, PolicyError, default_group_size, read_policy

CHARACTERS = 9  # of calibration text for each token, more than any tokenizer needs
FACTOR = 16.0  # of outliers
JUDGED = 3  # texts on which attention outputs are compared: one of each kind
WIDTHS = (4.0, 3.0, 2.0, 1.5)


@dataclass(frozen=True)
class Grid:
    """Which policies are measured; `quick` ones are enough for a test."""

    policies: tuple[str, ...]
    prefilled: tuple[str, ...]  # policies whose prompts attend in high precision, and by window
    asked: tuple[str, ...]  # those that must find facts as well
    windows: tuple[int, ...]
    sinks: tuple[int, ...]
    swept: tuple[str, ...]  # policies of windows, without options; the first one also with other sinks
    ingredients: str  # the policy whose codecs are varied
    tall: tuple[str, ...]  # policies that outliers are given to
    variants: tuple[errors.Variant, ...]


@dataclass
class Run:
    """One model's measurements."""

    model: Path
    grid: Grid
    sizes: texts.Sizes
    artifacts: Path  # a folder; artifacts found there are not made again
    recall: bool  # whether the model was trained to find facts
    started: float = field(default_factory=time.monotonic)
    refused: dict[str, str] = field(default_factory=dict)  # policy -> reason

    def __post_init__(self) -> None:
        _, self.encode = texts.encoder(self.model)
        self.exact = Engine(Subject(self.model, "f32"))
        self.say("reading held-out text over a float32 cache")
        window, sinks = max(*self.grid.windows, 128), max(*self.grid.sinks, 4)
        self.held_out = texts.held_out(self.encode, self.sizes, window + sinks)
        self.reader = Reader(self.exact, self.held_out)
        fit = self.encode(texts.calibration_text(3 * CHARACTERS * self.sizes.length))
        self.fit = errors.recorded(self.exact, self._cut(fit, 3))
        self.judged = errors.recorded(self.exact, [text.ids for text in self.held_out[:JUDGED]])
        self.questions = texts.multi_key(self.encode, self.sizes) if self.recall else []
        self.passkeys = [[one] for one in texts.passkeys(self.encode, self.sizes)] if self.recall else []
        self._dropped: dict[tuple[int, int], Readings] = {}

    def say(self, what: str) -> None:
        print(f"{time.monotonic() - self.started:6.0f} s  {what}", file=sys.stderr, flush=True)

    def _cut(self, ids: list[int], count: int) -> list[list[int]]:
        length = self.sizes.length
        return [ids[i * length : (i + 1) * length] for i in range(count)]

    def artifact(self, policy: str) -> Path | None:
        """What a policy is served with; None when it uses none. Raises PolicyError or CalibrationError."""
        read = read_policy(policy)
        if not read.is_calibrated:
            return None
        made_for = str(replace(read, window=128, num_sinks=4))  # an artifact holds for every window
        path = self.artifacts / f"{made_for.replace(':', '_').replace('/', '+')}.safetensors"
        if not path.exists():
            self.say(f"calibrating {made_for}")
            data = self.artifacts / "calibration.txt"
            data.write_text(texts.calibration_text(CHARACTERS * self.sizes.calibration), "utf-8")
            settings = CalibrationSettings(str(self.model), str(data), made_for, str(path), self.sizes.calibration)
            calibrate(settings)
        return path

    def engine(self, policy: str, prefill: Prefill = "windowed") -> Engine | None:
        """None when the policy cannot serve the model, which is noted."""
        try:
            return Engine(Subject(self.model, policy, self.artifact(policy), prefill=prefill))
        except (PolicyError, CalibrationError, StartError) as error:
            self.refused[policy] = str(error)
            return None

    def dropped(self, window: int, num_sinks: int) -> Readings:
        """The control with this window and these sinks."""
        if (window, num_sinks) not in self._dropped:
            self.say(f"dropping history beyond a window of {window} and {num_sinks} sinks")
            self._dropped[window, num_sinks] = self.reader.read(self._dropping(window, num_sinks))
        return self._dropped[window, num_sinks]

    def _dropping(self, window: int, num_sinks: int) -> Engine:
        return Engine(Subject(self.model, "f32", wrap=lambda kernel, _: Dropping(kernel, window, num_sinks)))

    def row(self, engine: Engine, name: str, recall: bool = False) -> dict[str, Any]:
        """All that is measured of one engine."""
        policy = engine.layout.policy
        dropped = self.dropped(policy.window, policy.num_sinks) if policy.is_quantized and policy.window else None
        row: dict[str, Any] = {"policy": name, "bits": engine.layout.effective_bits}
        row |= compared(self.reader.read(engine), self.reader.exact, dropped)
        row["output_error"] = errors.output_error(engine, self.judged)
        if recall and self.recall:
            row["recall"], row["passkey"] = find(engine, self.questions), find(engine, self.passkeys)
        self.say(f"{name}: loss {row['change']:+.2%}")
        return row


def make(model: Path, grid: Grid, sizes: texts.Sizes, artifacts: Path, recall: bool) -> Run:
    """Texts as long as the model's context allows."""
    context_len = open_checkpoint(model).config.context_len
    return Run(model, grid, replace(sizes, length=min(sizes.length, context_len)), artifacts, recall)


def policies(run: Run) -> list[dict[str, Any]]:
    """Every policy with the default window and sinks, after the control."""
    control: dict[str, Any] = {"policy": "dropped", "bits": None, "output_error": None}
    control |= compared(run.dropped(128, 4), run.reader.exact, run.dropped(128, 4))
    if run.recall:
        engine = run._dropping(128, 4)
        control |= {"recall": find(engine, run.questions), "passkey": find(engine, run.passkeys)}
    rows = [control]
    for name in run.grid.policies:
        engine_or_none = run.engine(name)
        if engine_or_none is not None:
            rows.append(run.row(engine_or_none, name, recall=name in run.grid.asked))
    return rows


def windows(run: Run) -> list[dict[str, Any]]:
    """Windows with 4 sinks, and of the first policy sinks with the default window."""
    rows = []
    for policy in run.grid.swept:
        chosen = [(window, 4) for window in run.grid.windows]
        if policy == run.grid.swept[0]:
            chosen += [(128, sinks) for sinks in run.grid.sinks] + [(0, 0)]
        for window, num_sinks in dict.fromkeys(chosen):
            name = f"{policy}:w{window}:s{num_sinks}"
            engine = run.engine(name)
            if engine is not None:
                rows.append({"window": window, "sinks": num_sinks} | run.row(engine, name))
    return rows


def prefill(run: Run) -> list[dict[str, Any]]:
    """What an answer costs whose prompt has read by window, or all in high precision: the second halves of texts."""
    modes: tuple[Prefill, ...] = ("windowed", "exact")
    plain = [text.ids for text in run.held_out if set(text.counted) & set(PLAIN)]
    best = [_answer_loss(run.exact, ids, is_exact=False) for ids in plain]
    rows = []
    for policy in run.grid.prefilled:
        for mode in modes:
            engine = run.engine(policy, mode)
            if engine is None:
                continue
            excess = [_answer_loss(engine, ids, mode == "exact") - b for ids, b in zip(plain, best, strict=True)]
            row = {"policy": policy, "bits": engine.layout.effective_bits, "prefill": mode}
            row |= {"change": mean(excess) / mean(best), "change_error": standard_error(excess) / mean(best)}
            if run.recall:
                row["recall"] = find(engine, run.questions)
            rows.append(row)
            run.say(f"{policy}, {mode} prompts: loss of answers {row['change']:+.2%}")
    return rows


def _answer_loss(engine: Engine, ids: list[int], is_exact: bool) -> float:
    """Nats a token of the second half, the first of its tokens left out: that one the prompt itself gives."""
    num_prompt = len(ids) // 2
    scores = engine.read_answer(ids, num_prompt, is_exact)[:-1]
    return -float(scores.gather(1, torch.tensor(ids[num_prompt + 1 :])[:, None]).double().mean())


def ingredients(run: Run) -> list[dict[str, Any]]:
    """Reorder, clip and rotation, each by itself and together, as the model is."""
    return _all_varied(run, run.grid.ingredients, 1.0)


def with_outliers(run: Run) -> list[dict[str, Any]]:
    """The same with one pair of key channels and one value channel FACTOR times as large."""
    return [row for policy in run.grid.tall for row in _all_varied(run, policy, FACTOR)]


def _all_varied(run: Run, policy: str, factor: float) -> list[dict[str, Any]]:
    """Nothing where the policy cannot serve the model."""
    engine = run.engine(policy)
    if engine is None:
        return []
    return [_varied(run, variant, policy, engine.layout.layers, factor) for variant in run.grid.variants]


def _varied(
    run: Run, variant: errors.Variant, policy: str, layers: Sequence[LayerPolicy], factor: float
) -> dict[str, Any]:
    """Codecs fitted to the training text; error and loss on held-out text."""
    keys, values = outliers(run.exact.layout.head_dim, factor)
    found = errors.codecs(variant, errors.scaled(run.fit, keys, values), layers)
    engine = Engine(Subject(run.model, policy, codecs=found, wrap=lambda kernel, _: Scaling(kernel, keys, values)))
    row: dict[str, Any] = {"policy": policy, "variant": variant.name, "factor": factor}
    row |= compared(run.reader.read(engine), run.reader.exact, run.dropped(128, 4))
    run.say(f"{policy}, {variant.name}, outliers {factor:g} times: loss {row['change']:+.2%}")
    return row | {"output_error": errors.output_error(engine, errors.scaled(run.judged, keys, values), 1 / values)}


def rounding(run: Run) -> list[dict[str, Any]]:
    """Squared error over that of SKVQ's published order, on normal data and on the model's rotated keys and values."""
    dim = run.exact.layout.head_dim
    group = default_group_size(dim)
    texts_of = [text for layer in run.judged for text in layer]
    normal = torch.randn(4000, 1, dim, generator=torch.Generator().manual_seed(0))
    data = {
        "normal": normal,
        "keys": Hadamard().apply(torch.cat([text.keys for text in texts_of]).flatten(0, 1)[:, None]),
        "values": Hadamard().apply(torch.cat([text.values for text in texts_of]).flatten(0, 1)[:, None]),
    }
    rows = []
    for bits in WIDTHS:
        try:
            layout = RowLayout(bits, dim, group)
        except ValueError as error:
            run.refused[f"{bits:g} bits"] = str(error)
            continue
        row: dict[str, Any] = {"bits": bits, "group": group}
        for name, x in data.items():
            prescale = torch.tensor([prescale_for(float(x.square().mean().sqrt()))])
            for label, clip in (("", 1.0), (", clipped", default_clip(bits, group))):
                codec = RowCodec(layout, torch.full((1, layout.num_groups), clip), prescale)
                row[name + label] = errors.order_of_rounding(x, codec)
        rows.append(row)
    return rows
