"""Signals where an exception may get lost."""

import signal
import subprocess
import sys

from server.interrupts import leaving_on_signals
from server.main import INTERRUPTED

CODE = """
import signal
from server.interrupts import leaving_on_signals

class Finalized:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

with leaving_on_signals(lambda: print("left", flush=True)):
    Finalized()
print("went on")
"""


def test_an_interrupt_in_a_finalizer_is_none_that_is_lost() -> None:
    """Bug: Ctrl-C while tokenizers are imported, a line about an ignored exception, and a server that goes on."""
    ended = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (INTERRUPTED, "left\n", "")


def test_behind_the_block_ctrl_c_is_what_it_was() -> None:
    before = signal.getsignal(signal.SIGINT)
    with leaving_on_signals(lambda: None):
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
