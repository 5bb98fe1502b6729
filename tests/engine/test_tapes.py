"""Recorded steps against steps that Python runs: the same bits, in logits and in the cache."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from engine.assembly import build
from engine.batch import BatchRow, build_batch
from engine.config import EngineConfig
from engine.models.decoder import Decoder
from engine.runner import Runner
from engine.tapes import MAX_ROWS, TapeRunner
from kernels import native
from kernels.native.recording import Buffers, Recording, Unrecordable
from kvcache.calibration import write_calibration
from tests.engine.artifacts import random_calibration
from tests.engine.models.oracle import write_checkpoint
from tests.engine.models.variants import SIZES

pytestmark = pytest.mark.skipif(native.MISSING is not None, reason=f"{native.MISSING}")

PAGE_SIZE, PAGES_EACH, NUM_SEQS = 16, 4, 6
CACHES = ["f16", "k4v4:w16:s4", "k8v8:w16/0=f16", "skvq:k4v2:w16"]  # the last with channels shifted and reordered


THREE = SIZES | {"num_hidden_layers": 3}  # what the first wrote is written over by the third
MODELS = {
    "llama": LlamaConfig(**THREE, head_dim=32),
    "qwen2": Qwen2Config(**THREE | {"hidden_size": 128}),  # has biases
    "qwen3": Qwen3Config(**THREE, head_dim=32),
}


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp(request.param)
    write_checkpoint(made, MODELS[request.param])
    return made


@dataclass(frozen=True)
class Side:
    """A runner and its cache."""

    runner: Runner
    decoder: Decoder
    num_recent_pages: int

    def step(self, *rows: tuple[int, int, int], window: int | None = None) -> Tensor:
        """Rows of (sequence, start, number)."""
        return self.runner.run(build_batch([self._row(*row, window) for row in rows]))

    def _row(self, sequence: int, start: int, count: int, window: int | None) -> BatchRow:
        tokens = [(7 * sequence + i * i) % 50 for i in range(start, start + count)]
        table = [PAGES_EACH * sequence + i for i in range(PAGES_EACH)]
        recent = dict(enumerate(table)) if self.num_recent_pages else {}
        return BatchRow(tokens, start, table, PAGE_SIZE, 1, recent, window if self.num_recent_pages else None)


def side(folder: Path, policy: str, rotated: bool = False) -> tuple[Side, list[Tensor]]:
    artifact = None
    if policy.startswith("skvq:"):
        made = random_calibration(folder, policy, rotated)
        header = msgspec.structs.replace(
            made.header, hadamard=((False, False),) * made.header.num_layers
        )  # orders alone
        artifact = str(folder / "random-calibration")
        write_calibration(Path(artifact), replace(made, header=header))
    config = EngineConfig(
        str(folder),
        kv_policy=policy,
        kv_calibration=artifact,
        page_size=PAGE_SIZE,
        max_model_len=64,
        max_num_seqs=8,
        kv_memory=1 << 22,
    )
    core, _ = build(config)
    runner, layers = core.parts.runner, core.parts.storage.layers
    assert isinstance(runner, TapeRunner)
    memory = [
        part for layer in layers for part in ([layer] if isinstance(layer, Tensor) else [layer.pages, layer.recent])
    ]
    for part in memory:
        part.zero_()
    return Side(runner, runner.model, core.parts.plan.num_recent_pages), memory


@pytest.mark.parametrize("policy", CACHES)
def test_any_rows_give_the_bits_of_python(folder: Path, policy: str) -> None:
    """Bug: calls that read what an earlier step left, in place of this one's rows, contexts, pages or windows; a layer
    that writes over what a later one reads."""
    (recorded, memory), (plain, expected) = side(folder, policy), side(folder, policy)
    plain = replace(plain, runner=Runner(plain.decoder, plain.runner.caches))
    steps = [
        [(0, 0, 20)],  # more than are recorded
        [(1, 0, 3)],
        [(0, 20, 1), (1, 3, 1), (2, 0, 1)],  # as many rows as the chunk before
        [(2, 1, 1)],
        [(0, 21, 1), (1, 4, 2)],
        [(i, 5 * (i > 2), 1) for i in range(3, 6)],
        [(0, 22, 13), (1, 6, 1), (2, 2, 2)],
        [(0, 35, 1)],
    ]
    for rows in steps:
        assert torch.equal(recorded.step(*rows), plain.step(*rows)), rows
    assert torch.equal(recorded.step((0, 36, 1), window=40), plain.step((0, 36, 1), window=40))
    assert torch.equal(recorded.step((0, 37, 1)), plain.step((0, 37, 1)))
    for mine, its in zip(memory, expected, strict=True):
        assert torch.equal(mine, its)
    assert isinstance(recorded.runner, TapeRunner)
    assert recorded.runner.note is None
    assert set(recorded.runner.tapes) == {1, 3, MAX_ROWS}


def test_what_torch_computes_is_not_lost(folder: Path) -> None:
    """Bug: a recording that leaves out what torch did between two kernels, and repeats its first result. Rotations by
    matrices are torch's."""
    (recorded, _), (plain, _) = (side(folder, "skvq:k4v2:w16", rotated=True) for _ in range(2))
    plain = replace(plain, runner=Runner(plain.decoder, plain.runner.caches))
    for start in range(3):
        assert torch.equal(recorded.step((0, start, 1)), plain.step((0, start, 1)))
    assert isinstance(recorded.runner, TapeRunner)
    assert recorded.runner.note == "layers are called from Python, kernel by kernel, because torch computes 'mT'"
    assert not recorded.runner.tapes


def test_more_layers_take_no_more_memory(folder: Path) -> None:
    """Bug: a layer's worth of memory for every layer and number of rows, hundreds of MiB for a 1B model."""
    (recorded, _) = side(folder, "f16")[0], None
    runner = recorded.runner
    assert isinstance(runner, TapeRunner)
    held = runner.num_bytes
    for count in range(1, MAX_ROWS + 1):
        recorded.step((0, 0, count))
    assert runner.num_bytes == held
    config = recorded.decoder.config
    widest = 2 * config.intermediate_size + 4 * config.hidden_size + 6 * config.num_heads * config.head_dim
    assert held <= 2 * MAX_ROWS * 4 * 2 * widest


def test_a_thread_keeps_one_tape() -> None:
    """Bug: calls that end up on another recording's tape."""
    from kernels.native import _native

    first, second = _native.Tape(), _native.Tape()
    first.start()
    with pytest.raises(RuntimeError, match="already"):
        second.start()
    x, out = torch.ones(4), torch.empty(4)
    _native.clamp(x.data_ptr(), 0.0, 2.0, 4, out.data_ptr())
    first.stop()
    _native.clamp(x.data_ptr(), 0.0, 2.0, 4, out.data_ptr())
    assert (first.num_calls, second.num_calls) == (1, 0)
    x.fill_(1.5)
    first.run()
    assert out.tolist() == [1.5, 1.5, 1.5, 1.5]


@torch.inference_mode()
@pytest.mark.parametrize("compute", [lambda x: x[:, :2].mul_(x[:, 2:]), lambda x: x.clamp(0.0), lambda x: x.double()])
def test_what_is_not_repeated_to_the_bit_is_refused(compute: Callable[[Tensor], Tensor]) -> None:
    """Bug: a native call that reads rows with gaps as if they had none; or an error that no caller expects."""
    with pytest.raises(Unrecordable), Recording(Buffers(2)):
        compute(torch.ones(2, 4))


@torch.inference_mode()
def test_a_layer_reads_what_the_last_one_wrote() -> None:
    """Bug: memory that is written again while the next layer still reads it."""
    x, recording = torch.ones(1, 4), Recording(Buffers(1))
    a, b = x, x
    with recording:
        for _ in range(4):
            recording.next_layer()
            total = a + b
            a, b = total, total + a
    assert (a.tolist(), b.tolist()) == ([[29.0] * 4], [[41.0] * 4])
    x.fill_(2)
    recording.run()
    assert (a.tolist(), b.tolist()) == ([[58.0] * 4], [[82.0] * 4])


def test_recording_does_not_import_torchs_compiler() -> None:
    """Bug: 1 to 4 s more at start, in the step that measures the speed, and 95 MB."""
    program = (
        "import sys, torch; from kernels.native.recording import Buffers, Recording\n"
        "with Recording(Buffers(1)): torch.empty_like(torch.empty(1))\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
