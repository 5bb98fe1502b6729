"""Statistics of a model's keys and values -> an artifact that tells the cache how to quantize them."""
