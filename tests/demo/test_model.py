"""The model is the architecture it claims, the circuits look where they should, and scores can fail."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from demo import circuits, gptq, tokenizer
from demo.books import Books, paragraphs
from demo.cases import Case, recall_case, score
from demo.export import hf_config
from demo.mixture import Mixture, Stage
from demo.model import DemoModel, ModelConfig
from demo.packed import unpack

SMALL = ModelConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, max_position_embeddings=64
)


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    """A small tokenizer of the same kind as the shipped one."""
    return tokenizer.train(Books([], []), 700, 0)


def test_weights_are_a_qwen3_checkpoint() -> None:
    ours = DemoModel(SMALL)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.2)
    theirs = Qwen3ForCausalLM(Qwen3Config(**{**hf_config(SMALL, 0, 2), "torch_dtype": "float32"}))
    weights = ours.state_dict()
    theirs.load_state_dict({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
    ids = torch.randint(0, 64, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_planted_model_continues_what_it_saw_before() -> None:
    model = DemoModel(ModelConfig())
    with torch.no_grad():
        before = repeat_loss(model)
        circuits.plant(model, seed=0)
        assert repeat_loss(model) < before - 0.3


def repeat_loss(model: DemoModel) -> float:
    """Loss on the second half of random tokens said twice."""
    run = torch.randint(3, 4096, (2, 60), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([run, run], dim=1)
    logits = model(ids[:, :-1])[:, 64:]
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 65:].flatten()))


def test_loss_counts_only_weighted_tokens() -> None:
    model = DemoModel(SMALL)
    ids = torch.randint(0, 64, (2, 21))
    weights = torch.zeros(2, 21)
    weights[:, 20] = 2.0
    total, every = model.loss(ids, weights, 0.0)
    last = nn.functional.cross_entropy(model(ids[:, :-1])[:, -1], ids[:, 20], reduction="sum")
    torch.testing.assert_close(total, 2 * last)
    assert float(every) > float(last.detach())


@pytest.mark.parametrize("text", ["Once upon a time", 'héllo\x00\n\t  "日本" 😀\r\n', "4172 <tool_call>{}</tool_call>"])
def test_any_text_round_trips(words: Tokenizer, text: str) -> None:
    assert words.decode(words.encode(text).ids) == text


def test_digits_are_single_tokens_and_templates_match_training(words: Tokenizer, tmp_path: Path) -> None:
    assert len(words.encode("4172").ids) == 4
    tokenizer.save(words, tmp_path)
    fast = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    text = fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == ("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_rows_are_full_seeded_and_weighted(words: Tokenizer) -> None:
    stage = Stage(1.0, 256, 1024, 0.6, 0.5)
    ids, weights = Mixture(words, Books([], []), 3).batch(stage)
    again, _ = Mixture(words, Books([], []), 3).batch(stage)
    assert ids.shape == weights.shape == (4, 257)
    assert torch.equal(ids, again)
    assert (weights == 0).any()
    assert (weights > 1).any()


def test_a_recall_case_has_its_distance(words: Tokenizer) -> None:
    books = Books([], ["A paragraph. Of some sentences. That says nothing of note."])
    near = recall_case(random.Random(0), words, books, 16, "held_out")
    far = recall_case(random.Random(0), words, books, 48, "held_out")
    assert len(far.prompt) - len(near.prompt) == 32
    assert near.answer == far.answer


def test_scores_fail_on_a_wrong_answer_and_on_a_cut_history() -> None:
    def successor(ids: Tensor) -> Tensor:
        return nn.functional.one_hot(ids + 1, 100).float()

    right, wrong = Case([5, 6], [7, 8]), Case([5, 6], [7, 9])
    assert score(successor, [right, wrong], 2) == 0.5

    def first(ids: Tensor) -> Tensor:
        return nn.functional.one_hot(ids[:, :1].expand_as(ids), 100).float()

    assert score(first, [Case([3, 4, 4], [3])], 1) == 1.0
    assert score(first, [Case([3, 4, 4], [3])], 1, window=2) == 0.0


def test_error_feedback_beats_plain_rounding() -> None:
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(128, 128, generator=g)
    x = torch.randn(512, 128, generator=g) @ mix
    weight = torch.randn(32, 128, generator=g)
    rounded, scales = gptq.quantize(weight, x.T @ x / 512)
    assert scales.shape == (32, 2)
    codes = rounded / scales.repeat_interleave(64, dim=1)
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
    plain = (weight / scales.repeat_interleave(64, 1)).round().clamp(-8, 7) * scales.repeat_interleave(64, 1)
    assert (x @ (rounded - weight).T).square().mean() < (x @ (plain - weight).T).square().mean()


def test_unpacking_reads_the_low_bits_first() -> None:
    word = torch.tensor([[0x76543210]], dtype=torch.int32)
    assert unpack(word, torch.tensor([[2.0]])).tolist() == [[-16.0, -14.0, -12.0, -10.0, -8.0, -6.0, -4.0, -2.0]]


def test_paragraphs_drop_the_licence_and_unwrap() -> None:
    body = "It was a bright cold day in April, and the clocks\nwere striking."
    text = f"junk\n*** START OF IT ***\n\n{body}\n\nshort\n\n*** END OF IT ***\njunk"
    assert paragraphs(text) == [body.replace("\n", " ")]
