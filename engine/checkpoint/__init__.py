"""One file per on-disk format: reads tensors, returns canonical weights."""
