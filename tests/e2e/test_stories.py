"""A trained model through HTTP: the text and the probabilities are those others computed."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.e2e.process import ServerProcess

STORIES = Path(__file__).parents[3] / "shared/models/stories260K"


pytestmark = pytest.mark.skipif(
    not (STORIES / "expected_greedy.json").is_file(),
    reason="the stories260K checkpoint does not lie beside the repository",
)


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("stories") / "log"
    with ServerProcess(STORIES, log, ["--served-name", "stories", "--head-bits", "16"]) as running:
        yield running.wait_ready()


def test_greedy_text_is_the_expected_one(stories: ServerProcess) -> None:
    client = openai.OpenAI(base_url=f"{stories.url}/v1", api_key="none", max_retries=0)
    for case in json.loads((STORIES / "expected_greedy.json").read_text()):
        prompt = case["prompt"] or case["prompt_ids"]
        answer = client.completions.create(
            model="stories", prompt=prompt, max_tokens=len(case["output_ids"]), temperature=0
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(case["prompt_ids"])  # the begin token is added, and once
        assert answer.choices[0].text.strip() == case["text"].strip()


@torch.no_grad()
def test_logprobs_are_within_a_thousandth(tmp_path: Path) -> None:
    """Every log-probability, of the prompt (echo) and of the answer, against transformers in float32.

    The cache is float32 as theirs: over the default float16 pages single tokens of this model (heads of 8 channels)
    move by up to 4e-3, the sum over a story by less than 2e-2 (see test_runner).
    """
    with ServerProcess(
        STORIES, tmp_path / "log", ["--served-name", "stories", "--head-bits", "16", "--kv", "f32"]
    ) as exact:
        check_logprobs(exact.wait_ready())


def check_logprobs(server: ServerProcess) -> None:
    case = json.loads((STORIES / "expected_greedy.json").read_text())[1]
    body = {
        "model": "stories",
        "prompt": case["prompt_ids"],
        "max_tokens": 60,
        "temperature": 0,
        "logprobs": 1,
        "echo": True,
    }
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["logprobs"]
    ids = torch.tensor([[*case["prompt_ids"], *case["output_ids"][:60]]])
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    rows = torch.log_softmax(model(ids).logits[0], -1)
    expected = rows[:-1].gather(1, ids[0, 1:, None])[:, 0]
    assert answer["token_logprobs"][0] is None
    assert torch.tensor(answer["token_logprobs"][1:]) == pytest.approx(expected, abs=1e-3)
