"""HTTP in, text out. FastAPI, pydantic, tokenizer, chat templates, metrics. No torch."""
