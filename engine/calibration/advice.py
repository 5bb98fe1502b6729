"""Where more bits would help most: a few layers often have nearly all of the error that a policy leaves."""

from collections.abc import Sequence
from dataclasses import replace

from kvcache.policy import Policy

MOST = 0.9  # of the error
FEW = 3  # layers of a model for each that may get more bits
KEY_BITS = 4.0  # values at 2 bits cost next to nothing, keys below 4 nearly everything


def wider(policy: Policy, errors: Sequence[float]) -> Policy | None:
    """The policy with keys of KEY_BITS in the layers that have MOST of the error; None where those are not few, where
    keys have such widths already, or where the policy treats layers differently as it is.

    errors: of each layer's attention outputs under `policy`.
    """
    chosen: list[int] = []
    for layer in sorted(range(len(errors)), key=lambda i: -errors[i]):
        if sum(errors[i] for i in chosen) >= MOST * sum(errors):
            break
        chosen.append(layer)
    are_few = 0 < len(chosen) <= max(1, len(errors) // FEW)
    if not are_few or policy.overrides or policy.widths.key_bits >= KEY_BITS:
        return None
    widths = replace(policy.widths, key_bits=KEY_BITS)
    return replace(policy, overrides=tuple((layer, widths) for layer in sorted(chosen)))
