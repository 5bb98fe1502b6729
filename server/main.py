"""The console script. It imports nothing but what Ctrl-C needs before the rest of the server, which takes a second."""

import sys

INTERRUPTED = 130  # what shells expect after SIGINT


def main() -> None:
    """Run the command line; Ctrl-C ends it without a traceback at any moment."""
    try:
        from server.cli import cli

        cli()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
