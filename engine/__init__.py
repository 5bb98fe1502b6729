"""Requests to batches to tokens. No HTTP, no text."""
