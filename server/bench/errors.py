"""What stops a load test before it starts."""


class BenchError(ValueError):
    """An option cannot be read, or the server cannot be measured; the message says what to do."""
