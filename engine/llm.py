"""The engine as a library: prompts in, completions out, no server. docs/python.md is its manual.

from engine import LLM, Sampling

llm = LLM("demo/checkpoint")
for answer in llm.generate(["Once upon a time"], Sampling(max_tokens=32, temperature=0)):
    print(answer.text)
"""

import itertools
import operator
import re
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers.decoders import DecodeStream

from engine.assembly import StartError, build
from engine.checkpoint.errors import CheckpointError
from engine.client import locate_model
from engine.config import EngineConfig
from engine.conversation import Message, check_variables, template_messages
from engine.messages import (
    Cancel,
    Done,
    Event,
    Failed,
    FinishReason,
    Logprobs,
    PromptLogprobs,
    Sampling,
    Submit,
    Token,
)
from engine.models.config import UnsupportedModel, read_json
from engine.tokenizer import read_tokenizer

Prompt = str | Sequence[int]  # text, or token ids

DEFAULT_MAX_TOKENS = 128
SETTINGS = EngineConfig.__struct_fields__[1:]  # all but the model
FLAG = re.compile(r"--([a-z][a-z-]*)")


class GenerationError(RuntimeError):
    """A prompt was refused or failed; the message is the engine's."""


@dataclass
class Completion:
    """One answer to one prompt."""

    text: str = ""  # without special tokens
    token_ids: list[int] = field(default_factory=list)  # without the one that stopped it
    logprobs: list[Logprobs] = field(default_factory=list)  # of each of them, if num_logprobs was set
    prompt_logprobs: list[Logprobs] = field(default_factory=list)  # of the prompt's but the first, likewise
    finish_reason: FinishReason = "length"


class LLM:
    """A model, loaded in this process. One call at a time, from one thread."""

    def __init__(self, model: str | Path, revision: str | None = None, offline: bool = False, **settings: Any) -> None:
        """model: a folder, a GGUF file, a name on the hub, or owner/name:file.gguf. revision: a branch, tag or commit
        of a hub model. offline: look for it on this machine only. settings: fields of EngineConfig.

        Raises TypeError for a setting that there is none of, ValueError for one of another type or range and for a
        model that cannot be found, and StartError for a model that cannot be served, or not with these settings.
        """
        for name in settings:
            if name not in SETTINGS:
                raise TypeError(f"LLM has no setting {name!r}; it has {', '.join(SETTINGS)}")
        named = {"model": model} | settings
        wishes: dict[str, Any] = {
            name: str(value) if isinstance(value, Path) else value for name, value in named.items()
        }
        EngineConfig(**wishes)  # before anything is fetched
        try:
            path = locate_model(wishes["model"], revision, offline)
            self._tokenizer = _tokenizer_of(path)
            self._core, self.plan = build(EngineConfig(**wishes | {"model": str(path)}))
        except (CheckpointError, StartError) as error:
            raise type(error)(in_python(str(error))) from error
        self._ids = itertools.count()
        self._is_running = False

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling | None = None, kv_policy: str | None = None
    ) -> list[Completion]:
        """Complete all prompts in one running batch; answers come in the order of the prompts.

        A prompt is text or token ids. Without `sampling` an answer has at most 128 tokens, fewer where the context ends
        before, drawn at temperature 1. kv_policy: a longer window in float16, or "f16", where kv_request_window allows
        it. Raises TypeError for what are no prompts, and GenerationError when one can never fit; the others are dropped
        with it.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Iterable):
            raise TypeError("prompts must be a list: write generate([text])")
        requests = [self._request(prompt, sampling, kv_policy) for prompt in prompts]
        answers = {request.id: Completion() for request in requests}
        with closing(self._steps(requests)) as steps:
            for event in itertools.chain.from_iterable(steps):
                self._hear(answers[event.id], event)
        return list(answers.values())

    def stream(self, prompt: Prompt, sampling: Sampling | None = None, kv_policy: str | None = None) -> Iterator[str]:
        """The text of one answer, piece by piece as its tokens come: `generate` of this prompt, cut up.

        Close it, or let go of it, to stop the answer. Until then nothing else can be generated. Raises as `generate`.
        """
        return self._pieces(self._request(prompt, sampling, kv_policy))

    def chat(
        self,
        conversations: Sequence[Sequence[Message]],
        sampling: Sampling | None = None,
        kv_policy: str | None = None,
    ) -> list[Completion]:
        """Answer each conversation, in one running batch: `generate` of their `chat_prompt`."""
        if conversations and isinstance(conversations[0], Mapping):
            raise TypeError("conversations must be a list of lists of messages: write chat([messages])")
        return self.generate([self.chat_prompt(messages) for messages in conversations], sampling, kv_policy)

    def chat_prompt(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """The token ids that the checkpoint's chat template makes of a conversation, the answer's turn opened.

        variables: of the template, such as enable_thinking, or continue_final_message. Raises ValueError when the model
        has no template, or with the template's own words when it takes no such messages; and for a message without role
        or content, or with what the template does not read; TypeError for such a variable and for what is no message.
        """
        if not self._tokenizer.chat_template:
            raise ValueError("this model has no chat template: use generate")
        template = self._tokenizer.get_chat_template()
        check_variables(variables, template)
        plain = template_messages(messages, template)
        options = {"add_generation_prompt": not variables.get("continue_final_message")} | variables
        text = self._render(plain, options)
        if any("name" in message for message in plain):  # templates have names of other things, such as tools
            nameless = [{key: value for key, value in message.items() if key != "name"} for message in plain]
            if self._render(nameless, options) == text:
                raise ValueError("a message has 'name', which this model's chat template does not read")
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])  # the template writes them itself

    def _render(self, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> str:
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except Exception as error:  # whatever a template raises is about the messages it was given
            raise ValueError(f"the chat template refused the messages: {error}") from error

    def _request(self, prompt: Prompt, sampling: Sampling | None, kv_policy: str | None) -> Submit:
        if sampling is not None and not isinstance(sampling, Sampling):
            raise TypeError(f"sampling must be a Sampling; found {sampling!r}")
        ids = self._tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else _token_ids(prompt)
        if sampling is None:
            sampling = Sampling(max_tokens=max(1, min(DEFAULT_MAX_TOKENS, self.plan.max_model_len - len(ids))))
        return Submit(str(next(self._ids)), ids, sampling, time.monotonic(), kv_policy=kv_policy)

    def _pieces(self, request: Submit) -> Iterator[str]:
        decoder, answer, num_shown = DecodeStream(skip_special_tokens=True), Completion(), 0
        with closing(self._steps([request])) as steps:
            for events in steps:
                num_tokens = len(answer.token_ids)
                for event in events:
                    self._hear(answer, event)
                for token in answer.token_ids[num_tokens:]:
                    piece = decoder.step(self._tokenizer.backend_tokenizer, token)
                    if piece:
                        num_shown += len(piece)
                        yield piece
        if len(answer.text) > num_shown:  # bytes that no token made a character
            yield answer.text[num_shown:]

    def _steps(self, requests: Sequence[Submit]) -> Generator[list[Event], None, None]:
        """What each step of the engine says of the requests, until all have ended. Raises GenerationError."""
        if self._is_running:
            raise GenerationError("this LLM still streams an answer: read it to its end, or close() it")
        self._is_running = True
        try:
            events = self._core.step(requests)
            while events or self._core.has_work:
                for event in events:
                    if isinstance(event, Failed):
                        raise GenerationError(in_python(event.message))
                yield events
                events = self._core.step([])
        finally:  # refused, failed, left or interrupted: nothing of this call may stay in the batch
            try:
                self._core.step([Cancel(request.id) for request in requests])
            finally:
                self._is_running = False

    def _hear(self, answer: Completion, event: Event) -> None:
        if isinstance(event, Token):
            answer.token_ids.append(event.token)
            if event.logprobs is not None:
                answer.logprobs.append(event.logprobs)
        elif isinstance(event, PromptLogprobs):
            answer.prompt_logprobs = event.entries
        elif isinstance(event, Done):
            answer.finish_reason = event.reason
            if event.stop_token is not None:
                del answer.token_ids[-1:], answer.logprobs[-1:]
            ids = answer.token_ids
            answer.text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _tokenizer_of(path: Path) -> Any:
    """Read before the weights, which take minutes where this takes a second. Raises StartError."""
    try:
        if path.is_dir():
            read_json(path)  # a folder that is no model is called that
        return read_tokenizer(path)
    except (CheckpointError, UnsupportedModel) as error:
        raise StartError(str(error)) from error


def in_python(message: str) -> str:
    """A message of the engine, which names settings as the command line does, with the names that they have here."""

    def name(flag: re.Match[str]) -> str:
        argument = {"kv": "kv_policy"}.get(flag[1], flag[1].replace("-", "_"))
        return argument if argument in (*SETTINGS, "offline") else flag[0]

    return FLAG.sub(name, message)


def _token_ids(prompt: Sequence[int]) -> list[int]:
    """Raises TypeError for anything but whole numbers; those of numpy and torch are fine."""
    try:
        if not isinstance(prompt, bytes):
            return [operator.index(token) for token in prompt]
    except TypeError:
        pass
    raise TypeError(f"a prompt must be text or a list of token ids; found {prompt!r}")
