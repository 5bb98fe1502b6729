"""The roofline of a model on this machine: inspect(config) -> Inspection."""

from engine.assembly import build
from engine.config import EngineConfig
from engine.machine import num_cores
from engine.messages import Inspection
from kernels import native


def inspect(config: EngineConfig) -> Inspection:
    """Load the model, measure how fast it decodes and how fast memory can be read. Raises StartError."""
    _, plan = build(config)
    on_cpu = plan.device == "cpu"
    return Inspection(
        plan=plan,
        weight_bytes_per_token=sum(use.num_bytes for use in plan.kernels),
        bandwidth=native.read_bandwidth(min(plan.threads, num_cores())) if on_cpu else None,
        isa=native.isa() if on_cpu else None,
    )
