"""`--device cuda` on a GPU that is not there (tests/engine/fake_cuda.py): what lies where, and who waits for whom."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs

from benchmarks.checkpoints import write_checkpoint
from benchmarks.shapes import Shape
from engine.assembly import _with_weights, build, make_manager
from engine.config import EngineConfig, ModelFacts, resolve
from engine.core import EngineCore
from engine.messages import Cancel, Done, Inbound
from tests.engine.artifacts import write_random
from tests.engine.fake_cuda import FREE_BYTES, Gpu, OnGpu, fake_cuda, held_bytes
from tests.engine.worlds import endings, run, submit, tokens_of
from tests.kernels.gpu_checks import needs_triton

pytestmark = needs_triton

FIXTURES = Path(__file__).parents[1] / "fixtures"
SHAPE = Shape(128, 256, 2, 4, 2, 64, 160, False)
CALIBRATED = "skvq:k4v2:g32:w32:s4"
POLICIES = ("f16", "k4v4:w32:s4", CALIBRATED)
RULES: Sequence[dict[str, Any]] = (
    {},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.7, "seed": 2, "top_k": 5, "top_p": 0.9},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4-bit weights of two layers, and a calibration."""
    made = tmp_path_factory.mktemp("model")
    write_checkpoint(made, SHAPE)
    write_random(made, CALIBRATED, made / "kvcal.safetensors")
    return made


@pytest.fixture(scope="module")
def gpu() -> Iterator[Gpu]:
    with pytest.MonkeyPatch.context() as patch, fake_cuda(patch) as found:
        yield found


@dataclass(frozen=True)
class Started:
    core: EngineCore
    compiled: set[Any]  # at start


@pytest.fixture(scope="module", params=POLICIES)
def started(gpu: Gpu, folder: Path, request: pytest.FixtureRequest) -> Started:
    gpu.clear()
    core = start(folder, request.param)
    return Started(core, {launch.compiled for launch in gpu.launches})


def start(folder: Path, policy: str, **more: Any) -> EngineCore:
    config: dict[str, Any] = {"kv_memory": 1 << 24, "max_num_seqs": 4, "max_batch_tokens": 64, "max_model_len": 4096}
    return build(EngineConfig(str(folder), device="cuda", kv_policy=policy, **config | more))[0]


def requests(num_tokens: int = 6) -> list[Inbound]:
    """Three rules of sampling, prompts of one chunk and of several."""
    return [
        submit(f"r{i}", [1 + j % 7 for j in range(5 + 60 * i)], max_tokens=num_tokens, ignore_eos=True, **rules)
        for i, rules in enumerate(RULES)
    ]


def until_decoding(core: EngineCore) -> None:
    """All requests let in, their prompts computed and a token drawn from each."""
    events = core.step(requests(12))
    while not all(tokens_of(events, f"r{i}") for i in range(len(RULES))):
        events += core.step([])


@pytest.mark.parametrize(
    "name",
    [
        "gptq-v1-4bit-asym-actorder",
        "gptq-v2-4bit-asym",  # whose embedding is its head
        "awq-gemv-fast-4bit-g32",
        "hqq-4bit-ragged",
        "bnb-nf4-nested-ragged-qwen2",
        "ct-nvfp4",
        "ct-fp8-block",
        "ct-int8-token",
        "quip-e8p12rvq3b",
        "gguf/types.gguf",
        "gguf/mixed.gguf",
    ],
)
def test_every_format_runs_on_a_gpu(gpu: Gpu, name: str) -> None:
    """Bugs: weights, tables or angles left on the CPU; a layer that is not the same once it was moved, as minima whose
    zero point, which stands for all, became one for each; a step that cannot be recorded, as an embedding in blocks."""
    sizes: dict[str, Any] = {"kv_memory": 1 << 24, "max_num_seqs": 2, "max_batch_tokens": 32}
    core, summary = build(EngineConfig(str(FIXTURES / name), device="cuda", kv_policy="f16", **sizes))
    assert not [note for note in summary.notes if "kernel by kernel" in note]
    (note,) = (note for note in summary.notes if "configurations of kernels" in note)
    assert note.startswith("no configurations of kernels were measured on a GPU that is not there")
    events = run(core, [submit("r", [1, 2, 3], max_tokens=4, ignore_eos=True)])
    assert len(tokens_of(events, "r")) == 4


def test_a_decode_step_waits_for_its_ids_and_for_nothing_else(gpu: Gpu, started: Started) -> None:
    """Bug: a copy that waits, or a question to the device, between the launches of a step: the GPU idles meanwhile.
    What a step sends are its tables, its tiles, and the rules of its draws; it waits for the ids of the one before."""
    core = started.core
    until_decoding(core)
    gpu.clear()
    core.step([])
    assert gpu.syncs == ["event"]
    assert {launch.kernel for launch in gpu.launches} == {"sampling.largest", "sampling.weigh", "sampling.pick"}
    assert len(gpu.uploads) == 3
    assert len(gpu.downloads) == 1
    run(core, [])


def test_a_step_with_prompts_waits_no_more_often(gpu: Gpu, started: Started) -> None:
    """Bug: each of a step's tables sent by a copy that waits until the GPU has nothing left to do."""
    core = started.core
    gpu.clear()
    core.step([submit("r", [1 + j % 7 for j in range(40)])])
    assert gpu.syncs == []
    assert len(gpu.launches) > 10 * SHAPE.num_layers
    core.step([])
    assert gpu.syncs == ["event"]
    run(core, [])


def test_the_host_is_one_chunk_of_a_prompt_ahead(gpu: Gpu, started: Started) -> None:
    """Bug: a long prompt launched as a whole, which a request that comes meanwhile must wait for."""
    core = started.core
    gpu.clear()
    core.step([submit("r", [1 + j % 7 for j in range(300)])])
    for num_waits in range(1, 4):
        core.step([])
        assert gpu.syncs == ["event"] * num_waits
    core.step([Cancel("r")])


def test_rules_and_scores_wait_no_more_often(gpu: Gpu, started: Started) -> None:
    """Bug: a row of logits copied to the CPU, or an answer of the GPU's that is waited for before the next question."""
    rules: dict[str, Any] = {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "logit_bias": {3: 1.0},
        "min_tokens": 2,
    }
    core = started.core
    gpu.clear()
    core.step([submit("r", [1, 2, 3], num_logprobs=3, num_prompt_logprobs=2, ignore_eos=True, **rules)])
    for num_waits in range(4):  # from the third step on without knowing the last token
        assert gpu.syncs == ["event"] * num_waits
        core.step([])
    run(core, [])


def test_no_request_waits_for_the_compiler(gpu: Gpu, started: Started) -> None:
    """Bug: a kernel, a block or a kind of argument that no step at start had: Triton compiles it, for seconds, while
    a request waits."""
    gpu.clear()
    prompt = [1 + j % 7 for j in range(150)]
    rules: list[dict[str, Any]] = [{"num_prompt_logprobs": 2}, {"num_logprobs": 3}, {"presence_penalty": 0.5}]
    run(started.core, [*requests(), *(submit(f"s{i}", prompt, **asked) for i, asked in enumerate(rules))])
    late = {launch.kernel: launch.compiled for launch in gpu.launches if launch.compiled not in started.compiled}
    assert not late


def test_sequences_fork_are_swapped_and_find_prefixes_on_a_gpu(gpu: Gpu, started: Started) -> None:
    """Bugs: pages indexed by ids on the CPU; pages that are saved to the GPU itself; one that is never written back."""
    parts, prompt = started.core.parts, [1 + j % 7 for j in range(100)]
    plan = structs.replace(parts.plan, num_pages=5, swap_bytes=1 << 24)
    core = EngineCore(replace(parts, plan=plan, manager=make_manager(plan, parts.storage.layout, "small")))
    events = run(core, [submit("fork", prompt, n=2, max_tokens=5, ignore_eos=True)])
    events += run(core, [submit("again", prompt, max_tokens=5, ignore_eos=True)])
    assert [event.num_cached_tokens for event in endings(events, "again") if isinstance(event, Done)] == [64]
    run(core, [submit(f"r{i}", [i + 1] * 120, max_tokens=20, ignore_eos=True) for i in range(2)])
    stats = core.stats()
    assert stats.swaps_out_total == stats.swaps_in_total > 0
    saved = parts.storage.save([0], [0] if plan.num_recent_pages else [])
    assert not any(isinstance(tensor, OnGpu) for tensor in (*saved.pages, *saved.recent))


def test_the_cache_is_planned_with_the_weights_as_they_lie_on_the_gpu(gpu: Gpu) -> None:
    """Bug: a cache that takes 85 % of what the files' size leaves, where 5-bit codes take 8 once they are packed: a
    model that fits ends with "lower --kv-memory"."""
    config = EngineConfig("model", device="cuda", kv_policy="f16")
    facts = ModelFacts(1 << 20, 1 << 17, 1 << 20, FREE_BYTES, 2, has_cuda=True)
    early = resolve(config, facts)
    before, weights = held_bytes(), torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
    gpu.is_weighed = True
    facts, plan = _with_weights(config, facts, early)
    gpu.is_weighed = False
    assert facts.weight_bytes == before + weights.nbytes
    assert early.num_pages - plan.num_pages == pytest.approx(
        0.85 * (facts.weight_bytes - (1 << 20)) / (64 << 17), abs=2
    )
