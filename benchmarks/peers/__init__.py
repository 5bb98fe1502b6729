"""The two sides of a comparison: each a process of its own that answers the requests of `protocol`."""
