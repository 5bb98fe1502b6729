"""The dense family: weights stored as they multiply, float32, float16 or bfloat16."""
