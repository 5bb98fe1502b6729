"""The load test: `nibble bench serve` and `nibble bench sweep`, against any OpenAI-compatible server."""
