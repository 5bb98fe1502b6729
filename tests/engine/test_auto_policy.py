"""What --kv auto comes to."""

from pathlib import Path

import pytest
from transformers import Qwen3Config

from engine.assembly import StartError, build
from engine.config import EngineConfig
from engine.messages import PlanSummary
from kernels import native
from tests.engine.models.oracle import write_checkpoint
from tests.engine.models.variants import SIZES


def plan_of(folder: Path, head_dim: int, **wishes: object) -> PlanSummary:
    write_checkpoint(folder, Qwen3Config(**SIZES, head_dim=head_dim))
    return build(EngineConfig(str(folder), max_num_seqs=4, **wishes))[1]  # type: ignore[arg-type]


def said(plan: PlanSummary) -> str:
    return "; ".join(note for note in plan.notes if "not k4v4" in note)


@pytest.mark.skipif(native.MISSING is not None, reason="auto is float16 without the C++ kernels")
def test_a_model_that_the_kernel_serves_gets_four_bits(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, 32)
    assert (plan.kv_policy, said(plan)) == ("k4v4", "")
    assert plan.num_recent_pages > 0


@pytest.mark.parametrize(
    ("head_dim", "wishes", "why"),
    [
        (4, {}, "4 bits are packed 8 channels at a time"),
        (16, {}, "groups of 8 channels"),  # the C++ kernel takes multiples of 16
        (32, {"kernel": "reference"}, "slow on the reference kernel"),
    ],
)
def test_others_get_float16_and_hear_why(tmp_path: Path, head_dim: int, wishes: dict[str, str], why: str) -> None:
    """Bug: a model that no longer starts, or crawls on the reference kernel, because of a default."""
    plan = plan_of(tmp_path, head_dim, **wishes)
    assert plan.kv_policy == "f16"
    assert "KV cache in f16, not k4v4: " in said(plan)
    if native.MISSING is None:
        assert why in said(plan)


def test_what_is_asked_for_is_kept(tmp_path: Path) -> None:
    """Bug: a named calibration that is not used, because auto chose a policy without one."""
    assert plan_of(tmp_path, 32, kv_policy="f16").kv_policy == "f16"
    with pytest.raises(StartError, match=r"--kv-calibration names it\.safetensors.*such as --kv skvq:k2v2"):
        plan_of(tmp_path, 32, kv_calibration="it.safetensors")
