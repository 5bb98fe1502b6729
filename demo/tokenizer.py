"""The demo tokenizer: byte-level BPE with single digits, ChatML special tokens and a chat template."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from demo import recall, skills
from demo.books import Books
from demo.stories import sentences, story
from demo.text import CLOSE, END, OPEN

SPECIAL = (END, OPEN, CLOSE)
# The split of Qwen2: contractions, words with their leading space, single digits, punctuation, line ends.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """{%- set first = messages[0] -%}
{%- if tools -%}
{{- '<|im_start|>system\\n' -}}
{%- if first.role == 'system' %}{{- first.content + '\\n' -}}{% endif -%}
{{- 'You may call these tools:\\n<tools>\\n' -}}
{%- for tool in tools %}{{- tool | tojson + '\\n' -}}{% endfor -%}
{{- '</tools>\\nTo call one, answer <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>\\n' -}}
{%- elif first.role == 'system' -%}
{{- '<|im_start|>system\\n' + first.content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'system' and loop.first -%}
{%- elif message.role == 'tool' -%}
{{- '<|im_start|>user\\n<tool_response>' + message.content + '</tool_response><|im_end|>\\n' -}}
{%- else -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content %}{{- message.content -}}{% endif -%}
{%- for call in message.tool_calls or [] -%}
{%- set call = call.function or call -%}
{{- '<tool_call>{"name": "' + call.name + '", "arguments": ' -}}
{{- call.arguments if call.arguments is string else call.arguments | tojson -}}
{{- '}</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' -}}{% endif -%}
"""


def corpus(books: Books, seed: int) -> Iterator[str]:
    """Text to learn merges from: every generator, and the training part of the books."""
    rng = random.Random(seed)
    for _ in range(1500):
        yield story(rng, "train")
        yield recall.interleaved(rng, "train", sentences(rng, "train"), 8).text
        yield recall.chains(rng, "train", [], 4).text
        for task in skills.TASKS.values():
            example = task(rng, "train")
            yield f"user\n{example.prompt}\nassistant\n{example.answer}\n"
        for pair in (skills.tool_call(rng, "train"), skills.obedience(rng, "train")):
            yield f"system\n{pair[0]}\n{pair[1].prompt}\n{pair[1].answer}\n"
    yield from books.train


def train(books: Books, vocab_size: int, seed: int) -> Tokenizer:
    """Learn a byte-level BPE; the special tokens get the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(books, seed), trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=CLOSE,
        pad_token=END,
        additional_special_tokens=[OPEN],
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(str(folder))
