"""What precision a request may ask for beyond the KV cache's own: a longer window, or all of it in float16.

A sequence's packed pages are written whatever it asks for. One with a longer window only keeps more recent pages
(kvcache/recent.py), and f16 is a window as long as the sequence.
"""

from dataclasses import replace

from kvcache.layout import PageLayout
from kvcache.policy import MAX_WINDOW, Policy, PolicyError, read_policy

SETTING = "--kv-request-window"


class PrecisionRefused(ValueError):
    """The request cannot have the precision that it asks for; the message says which it could."""


def window_of(asked: str | None, num_tokens: int, layout: PageLayout, limit: int) -> int | None:
    """The window of a request that names the cache policy `asked`; None where the cache's own is meant.

    num_tokens: prompt and answer. limit: the most tokens of one request that are read in high precision because it asks
    for it. Raises PrecisionRefused.
    """
    own = layout.policy
    if asked is None:
        return None
    try:
        wanted = read_policy(asked)
    except PolicyError as error:
        raise PrecisionRefused(str(error)) from error
    if not own.is_quantized:
        if wanted != own:
            raise PrecisionRefused(f"{wanted} is not what is kept here: the KV cache holds {own} for every request")
        return None
    if wanted.is_quantized:
        return _longer_window(wanted.window, replace(wanted, window=own.window), layout, limit)
    if wanted.widths.key_bits > 16:
        raise PrecisionRefused(f"{wanted} is kept nowhere here; the highest precision is f16")
    _check_limit("f16", limit)
    if num_tokens > limit:
        raise PrecisionRefused(
            f"f16 for {num_tokens} tokens of prompt and answer is more than the {limit} that one request may have "
            f"({SETTING}): lower max_tokens, shorten the prompt, or ask for a window"
        )
    return limit


def _longer_window(window: int, with_own_window: Policy, layout: PageLayout, limit: int) -> int | None:
    own = layout.policy
    try:
        layers = with_own_window.layers(layout.num_layers, layout.head_dim, layout.calibration is not None)
    except PolicyError as error:
        raise PrecisionRefused(str(error)) from error
    if layers != layout.layers:
        longest = replace(own, window=max(own.window, min(limit, MAX_WINDOW)))
        raise PrecisionRefused(
            f"{replace(with_own_window, window=window)} differs from the KV cache's own {own} in more than the window: "
            f"widths, groups and sinks are the same for all; ask for {longest} or f16"
        )
    if window < own.window:
        raise PrecisionRefused(f"a window of {window} is shorter than the KV cache's own {own.window}, and none may be")
    if window == own.window:
        return None
    _check_limit(f"a window of {window}", limit)
    if window > limit:
        raise PrecisionRefused(f"a window of {window} is longer than the {limit} that one request may have ({SETTING})")
    return window


def _check_limit(what: str, limit: int) -> None:
    if limit == 0:
        raise PrecisionRefused(f"{what} is not on offer: the model was loaded without {SETTING}")
