"""Stand-ins for what the server stands on: an engine that says what it is told to, and a tokenizer of bytes."""

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.client import EngineState, EngineUnavailable
from engine.messages import (
    Accepted,
    Done,
    Event,
    Failed,
    FinishReason,
    KernelUse,
    Logprobs,
    PlanSummary,
    PromptLogprobs,
    Ready,
    Stats,
    Submit,
    Token,
)
from server.tokenizer import Tokenizer

BOS, EOS, END_TURN = 256, 257, 258
VOCAB_SIZE = 259

PLAN = PlanSummary(
    model="fake",
    architecture="FakeForCausalLM",
    format="fake 4-bit g64",
    device="cpu",
    dtype="float32",
    kernels=[
        KernelUse("linear 4-bit g64", "native", "", 1 << 20),
        KernelUse("attention f16", "reference", "native: not built"),
    ],
    kv_policy="f16",
    page_size=16,
    num_pages=64,
    kv_bytes_per_token=1024,
    bytes_per_page=16 * 1024,
    weight_bytes=1 << 20,
    max_model_len=512,
    max_num_seqs=4,
    max_batch_tokens=256,
    prefix_caching=True,
    threads=1,
    vocab_size=VOCAB_SIZE,
    load_seconds=0.1,
    decode_tokens_per_s=100.0,
    eos_token_ids=(EOS, END_TURN),
)


class ByteTokenizer(Tokenizer):
    """One token per byte, and three special ones."""

    def __init__(self, has_chat_template: bool = True) -> None:
        self._has_chat_template = has_chat_template
        self._names = {BOS: b"<s>", EOS: b"</s>", END_TURN: b"<end>"}

    @property
    def drops_first_space(self) -> bool:
        return False

    @property
    def max_token_bytes(self) -> int:
        return 1

    @property
    def has_chat_template(self) -> bool:
        return self._has_chat_template

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [BOS] * add_special_tokens + list(text.encode())

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        shown = (token for token in ids if not (skip_special_tokens and self.is_special(token)))
        return b"".join(map(self.token_bytes, shown)).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < BOS else self._names.get(token, b"")

    def is_special(self, token: int) -> bool:
        return token >= BOS

    @property
    def template_variables(self) -> frozenset[str]:
        return frozenset({"messages", "add_generation_prompt", "enable_thinking"})

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        turns = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        return turns + ("assistant:" if options.get("add_generation_prompt") else "")


@dataclass
class Script:
    """What the engine does with one request."""

    tokens: Sequence[int] = ()  # of every choice; the engine ends earlier at max_tokens or a stop token
    delay_s: float = 0.0  # before each token
    failure: Failed | None = None  # sent after the tokens, in place of Done
    hang: bool = False  # after the tokens, nothing more
    vary: Callable[[int, int], int] = lambda index, token: token  # what a choice says in place of a token


def say(text: str, **options: Any) -> Script:
    """Answer with this text, then the end token."""
    return Script([*text.encode(), EOS], **options)


class FakeStream:
    """Events of one request, as they are put in."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Event] = asyncio.Queue()

    async def next(self) -> list[Event]:
        events = [await self.queue.get()]
        while not self.queue.empty():
            events.append(self.queue.get_nowait())
        return events


@dataclass
class FakeEngine:
    """An EngineClient whose answers are scripted; it honours max_tokens, stop tokens, n and log-probabilities."""

    script: Callable[[Submit], Script] = lambda submit: say("hello")
    plan: PlanSummary = PLAN
    state: EngineState = "ready"
    stats: Stats = field(default_factory=Stats)
    submitted: list[Submit] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    cancelled_choices: list[tuple[str, int]] = field(default_factory=list)
    stopped: bool = False
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    streams: dict[str, FakeStream] = field(default_factory=dict)

    @property
    def process_id(self) -> int | None:
        return os.getpid()

    @property
    def ready(self) -> Ready | None:
        return None if self.state == "starting" else Ready(self.plan)

    async def start(self) -> None:
        self.state = "ready"

    async def wait_ready(self) -> Ready:
        if self.state == "failed":
            raise EngineUnavailable("the checkpoint is broken", 0)
        return Ready(self.plan)

    def submit(self, request: Submit) -> FakeStream:
        if self.state != "ready":
            raise EngineUnavailable(f"the engine is {self.state}", 3.0)
        self.submitted.append(request)
        stream = self.streams[request.id] = FakeStream()
        self.tasks[request.id] = asyncio.ensure_future(self._run(request, stream.queue))
        return stream

    def cancel(self, request_id: str) -> None:
        task = self.tasks.pop(request_id, None)
        if task is not None:
            self.streams.pop(request_id)
            if not task.done():
                self.cancelled.append(request_id)
                task.cancel()

    def cancel_choice(self, request_id: str, index: int) -> None:
        self.cancelled_choices.append((request_id, index))
        if request_id in self.streams:
            self.streams[request_id].queue.put_nowait(Done(request_id, index, "cancelled"))

    async def stop(self) -> None:
        self.state, self.stopped = "stopped", True
        for request_id, stream in self.streams.items():
            self.tasks[request_id].cancel()
            stream.queue.put_nowait(Failed(request_id, "engine", "the engine was stopped"))

    async def _run(self, submit: Submit, queue: asyncio.Queue[Event]) -> None:
        script, sampling = self.script(submit), submit.sampling
        if submit.kv_policy is not None and script.failure is None:
            queue.put_nowait(Accepted(submit.id))
        if sampling.num_prompt_logprobs is not None:
            entries = [_score(token, sampling.num_prompt_logprobs) for token in submit.prompt[1:]]
            queue.put_nowait(PromptLogprobs(submit.id, entries))
        ends = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else self.plan.eos_token_ids)}
        stop_token = None
        for token in script.tokens[: sampling.max_tokens]:
            await asyncio.sleep(script.delay_s)
            scored = None if sampling.num_logprobs is None else _score(token, sampling.num_logprobs)
            for index in self._running(submit):
                queue.put_nowait(Token(submit.id, index, script.vary(index, token), scored))
            if token in ends:
                stop_token = token
                break
        if script.hang:
            await asyncio.sleep(3600)
        if script.failure is not None:
            queue.put_nowait(script.failure)
            return
        reason: FinishReason = "length" if stop_token is None else "stop"
        for index in self._running(submit):
            cached = 1 if index == 0 else len(submit.prompt)
            queue.put_nowait(Done(submit.id, index, reason, stop_token, num_cached_tokens=cached, queued_s=0.01))

    def _running(self, submit: Submit) -> list[int]:
        """Choices that were not cancelled alone."""
        return [index for index in range(submit.n) if (submit.id, index) not in self.cancelled_choices]


def _score(token: int, num_top: int) -> Logprobs:
    """The chosen token at -0.5; the likeliest others are the letters after it."""
    top = [((token + i) % VOCAB_SIZE, -0.5 - i) for i in range(num_top)]
    return Logprobs(token, -0.5, top)
