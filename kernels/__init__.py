"""Low-bit compute on plain tensors. Knows shapes and formats, nothing of requests."""
