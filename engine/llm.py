"""The engine as a library: a batch of prompts in, completions out, no server.

from engine import LLM, Sampling

llm = LLM("demo/checkpoint")
for answer in llm.generate(["Once upon a time"], Sampling(max_tokens=32, temperature=0)):
    print(answer.text)
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.assembly import build
from engine.checkpoint.gguf_choice import SUFFIX
from engine.client import file_tokenizer, locate_model
from engine.config import EngineConfig
from engine.messages import Cancel, Done, Failed, FinishReason, Logprobs, Sampling, Submit, Token


class GenerationError(RuntimeError):
    """A prompt was refused or failed; the message is the engine's."""


@dataclass
class Completion:
    """One answer to one prompt."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)  # without the token that stopped it
    logprobs: list[Logprobs] = field(default_factory=list)  # when the sampling asked for them
    finish_reason: FinishReason = "length"


class LLM:
    """A loaded checkpoint: a folder, a GGUF file or a name on the hub. Keyword arguments are those of EngineConfig."""

    def __init__(self, model: str, revision: str | None = None, offline: bool = False, **settings: Any) -> None:
        path = locate_model(model, revision, offline)
        self._core, self.plan = build(EngineConfig(str(path), **settings))
        self._tokenizer = _tokenizer(path)
        self._ids = itertools.count()

    def generate(self, prompts: Sequence[str | list[int]], sampling: Sampling | None = None) -> list[Completion]:
        """Complete all prompts in one running batch; answers come in the order of the prompts.

        A prompt is text or token ids. Raises TypeError for a single text in place of a list of them, and
        GenerationError when one can never fit or the sampling makes no sense; the others are dropped with it.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list: write generate([text])")
        requests: list[Submit] = []
        for prompt in prompts:
            ids = self._tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
            requests.append(Submit(str(next(self._ids)), ids, sampling or Sampling(max_tokens=128), time.monotonic()))
        try:
            return self._run(requests)
        finally:  # refused, failed or interrupted: nothing of this call may stay in the batch
            self._core.step([Cancel(request.id) for request in requests])

    def _run(self, requests: list[Submit]) -> list[Completion]:
        answers = {request.id: Completion() for request in requests}
        events = self._core.step(requests)
        while events or self._core.has_work:
            for event in events:
                if isinstance(event, Failed):
                    raise GenerationError(event.message)
                if isinstance(event, Token):
                    answers[event.id].token_ids.append(event.token)
                    if event.logprobs is not None:
                        answers[event.id].logprobs.append(event.logprobs)
                elif isinstance(event, Done):
                    self._end(answers[event.id], event)
            events = self._core.step([])
        return [answers[request.id] for request in requests]

    def _end(self, answer: Completion, done: Done) -> None:
        answer.finish_reason = done.reason
        if done.stop_token is not None:
            answer.token_ids.pop()
        answer.text = str(self._tokenizer.decode(answer.token_ids, skip_special_tokens=True))


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    return file_tokenizer(path)[0] if path.suffix == SUFFIX else AutoTokenizer.from_pretrained(path)
