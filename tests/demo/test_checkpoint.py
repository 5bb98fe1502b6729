"""What ships: small, complete, readable, and able to remember."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from demo import evaluate
from demo.cases import recall_case, score
from demo.text import chat_prompt, turn

FOLDER = Path(evaluate.__file__).parent / "checkpoint"


@pytest.fixture(scope="module")
def subject() -> evaluate.Subject:
    """The packed checkpoint in float32."""
    return evaluate.load(FOLDER, None, 8)


def test_it_is_at_most_six_megabytes_and_packed() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 6_000_000
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["format"] == "pack-quantized"
    group = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert (group["num_bits"], group["group_size"], group["symmetric"]) == (4, 64, True)


def test_it_stops_at_both_ends_and_its_template_is_the_training_format() -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(FOLDER))
    stops = json.loads((FOLDER / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    assert tokenizer.convert_ids_to_tokens(stops) == ["<|im_end|>", "<|endoftext|>"]
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == chat_prompt(
        "Hi", "Be kind."
    )


def test_the_template_writes_tools_and_calls_as_trained() -> None:
    from demo.skills import tool_schema, tool_system

    tokenizer = AutoTokenizer.from_pretrained(str(FOLDER))
    tools = [tool_schema("get_weather"), tool_schema("buy_item")]
    call = {"type": "function", "function": {"name": "buy_item", "arguments": {"item": "lamp"}}}
    messages: list[Any] = [
        {"role": "user", "content": "Please buy a lamp."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    assert tokenizer.apply_chat_template(messages, tools=list[Any](tools), tokenize=False) == (
        turn("system", tool_system(tools))
        + turn("user", "Please buy a lamp.")
        + turn("assistant", '<tool_call>{"name": "buy_item", "arguments": {"item": "lamp"}}</tool_call>')
    )


@torch.inference_mode()
def test_it_recalls_what_the_history_holds_and_nothing_else(subject: evaluate.Subject) -> None:
    rng = random.Random(0)
    cases = [recall_case(rng, subject.tokenizer, subject.books, 200, "held_out") for _ in range(12)]
    assert score(subject.logits, cases, 12) > 0.7
    assert score(subject.logits, cases, 12, window=128) < 0.2


@torch.inference_mode()
def test_four_words_become_a_story(subject: evaluate.Subject) -> None:
    text = evaluate.complete(subject, "Once upon a time", 120, 0.0, 0)
    assert text.count(".") >= 3
    assert evaluate.perplexity(subject, evaluate.held_out_stories(3)) < 10
