"""What a quantized cache costs in quality: python -m benchmarks.kv_quality (see __main__.py)."""
