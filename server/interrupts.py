"""Signals where an exception may get lost."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def leaving_on_signals(leave: Callable[[], object]) -> Iterator[None]:
    """SIGINT and SIGTERM in this block call `leave` and end the process at once, with 128 + their number.

    No KeyboardInterrupt: of those that come while libraries are imported, one in thirty meets a finalizer, which prints
    it and lets the program go on.
    """

    def end(number: int, _: object) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        try:
            leave()
            sys.stderr.flush()
        finally:  # signals are deaf by now, and what is raised here may get lost as well
            os._exit(128 + number)

    before = [signal.signal(each, end) for each in SIGNALS]
    try:
        yield
    finally:
        for each, handler in zip(SIGNALS, before, strict=True):
            signal.signal(each, handler)
