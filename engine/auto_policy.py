"""What `--kv auto` comes to: decided(config, checkpoint) -> (config, note)."""

import msgspec
import torch

import kernels.attention.registry
from engine.config import EngineConfig
from engine.loading import ACTIVATION_DTYPES, Checkpoint, page_layout
from kernels.attention.quantized.cache import QuantizedSpec
from kvcache.policy import PolicyError

AUTO = "auto"
PREFERRED, PLAIN = "k4v4", "f16"


def decided(config: EngineConfig, checkpoint: Checkpoint) -> tuple[EngineConfig, str | None]:
    """The configuration with a policy that has a name, and why it is not the preferred one.

    Preferred is what a fast kernel serves: the reference kernel would make a model that runs well in float16 slow.
    Raises PolicyError when a calibration is named, which no automatic policy uses.
    """
    if config.kv_policy != AUTO:
        return config, None
    if config.kv_calibration is not None:
        raise PolicyError(
            f"--kv-calibration names {config.kv_calibration}, which {PREFERRED} does not use: add a policy that does, "
            "such as --kv skvq:k2v2"
        )
    reason = _why_not(config, checkpoint)
    policy, note = (PREFERRED, None) if reason is None else (PLAIN, f"KV cache in {PLAIN}, not {PREFERRED}: {reason}")
    return msgspec.structs.replace(config, kv_policy=policy), note


def _why_not(config: EngineConfig, checkpoint: Checkpoint) -> str | None:
    try:
        layout = page_layout(checkpoint, PREFERRED, config.page_size)
    except PolicyError as error:
        return str(error)
    device, model = "cpu" if config.device == AUTO else config.device, checkpoint.config
    chunk = layout.chunk(layout.layers[0])
    spec = QuantizedSpec(model.num_heads, model.num_kv_heads, chunk, torch.device(device), ACTIVATION_DTYPES[device])
    if config.kernel == "reference":
        return "it is slow on the reference kernel, which --kernel asks for"
    fast = [kernel for kernel in kernels.attention.registry.kernels_for("quantized") if kernel.name != "reference"]
    refusals = [f"{kernel.name} kernel: {reason}" for kernel in fast if (reason := kernel.refuses(spec)) is not None]
    return "; ".join(refusals) if len(refusals) == len(fast) else None
