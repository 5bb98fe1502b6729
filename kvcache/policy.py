"""The names of cache policies, and what each means for storage."""

from dataclasses import dataclass


class PolicyError(ValueError):
    """The policy is not known or cannot serve the model; the message says which can."""


@dataclass(frozen=True)
class Policy:
    """How keys and values are stored."""

    name: str
    bytes_per_element: int


POLICIES = {
    "f16": Policy("f16", 2),  # the default: what full-precision servers keep
    "f32": Policy("f32", 4),  # the oracle that numeric tests compare with
}


def parse_policy(name: str) -> Policy:
    """Return the policy called `name`. Raises PolicyError with the names that exist."""
    if name not in POLICIES:
        raise PolicyError(f"KV cache policy {name!r} is not known: use one of {', '.join(POLICIES)}")
    return POLICIES[name]
