"""Stop strings in text that arrives in pieces."""

from collections.abc import Sequence


class StopScanner:
    """Lets text through up to the first stop string, and holds back what could still become one.

    First means completed first; of two completed by the same character, the longer. So the cut does not depend on how
    the text was split into pieces.
    """

    def __init__(self, stops: Sequence[str], keep_stop: bool = False) -> None:
        self._stops = tuple(stops)
        self._keep_stop = keep_stop
        self._held = ""
        self._longest = max(map(len, stops), default=0)
        self.found: str | None = None  # the stop string that ended the text

    def push(self, text: str) -> str:
        """The text that may be shown now. After `found` is set, push no more."""
        text = self._held + text
        self._held = ""
        match = self._first_match(text)
        if match is not None:
            end, self.found = match
            return text[:end] if self._keep_stop else text[: end - len(self.found)]
        keep = self._num_held(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, now that no text follows."""
        text, self._held = self._held, ""
        return text

    def _first_match(self, text: str) -> tuple[int, str] | None:
        """(end, stop string) of the match completed first."""
        matches = [(start + len(stop), stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        return min(matches, key=lambda match: (match[0], -len(match[1])), default=None)

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            if any(len(stop) > size and stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0
