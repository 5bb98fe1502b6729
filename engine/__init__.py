"""Requests to batches to tokens. No HTTP, no text.

As a library:  from engine import LLM, Sampling        (docs/python.md)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.assembly import StartError
    from engine.llm import LLM, Completion, GenerationError
    from engine.messages import Sampling

__all__ = ["LLM", "Completion", "GenerationError", "Sampling", "StartError"]


def __getattr__(name: str) -> Any:
    """Import on first use: the server reads engine.messages and must not load torch for it."""
    if name == "Sampling":
        from engine.messages import Sampling

        return Sampling
    if name in __all__:
        from engine import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
