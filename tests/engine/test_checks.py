"""Settings and sampling rules are refused where they are written, by name."""

import math
from typing import Any

import msgspec
import numpy as np
import pytest

from engine.config import EngineConfig
from engine.messages import Sampling

NAN = float("nan")


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"max_tokens": "5"}, "max_tokens must be int >= 0; found '5'"),
        ({"max_tokens": 4.5}, "max_tokens must be int >= 0; found 4.5"),
        ({"top_k": -7}, "top_k must be int >= -1; found -7"),
        ({"top_k": 1.5}, "top_k must be int"),
        ({"top_k": True}, "top_k must be int"),
        ({"top_k": 2**70}, "top_k must be int"),  # no machine word holds it
        ({"temperature": -1}, "temperature must be float >= 0; found -1"),
        ({"temperature": NAN}, "temperature must be float >= 0; found nan"),
        ({"temperature": math.inf}, "temperature must be float >= 0; found inf"),  # times -inf it is NaN
        ({"top_p": 1.5}, "top_p must be 0 <= float <= 1; found 1.5"),
        ({"min_p": "0"}, "min_p must be 0 <= float <= 1; found '0'"),
        ({"presence_penalty": NAN}, "presence_penalty must be float; found nan"),
        ({"frequency_penalty": None}, "frequency_penalty must be float; found None"),
        ({"repetition_penalty": 0}, "repetition_penalty must be 0.01 <= float <= 100; found 0"),
        ({"logit_bias": {"5": 1}}, r"logit_bias must be dict\[int >= 0, float\]; found {'5': 1}"),
        ({"logit_bias": {5: NAN}}, "logit_bias must be .* found {5: nan}"),
        ({"seed": 1.5}, r"seed must be int \| None; found 1.5"),
        ({"stop_token_ids": ("a",)}, r"stop_token_ids must be tuple\[int >= 0, ...\]"),
        ({"ignore_eos": 1}, "ignore_eos must be bool; found 1"),
        ({"num_logprobs": -2}, r"num_logprobs must be int >= 0 \| None; found -2"),
        ({"min_tokens": 9}, "min_tokens 9 is more than max_tokens 8"),
        ({"temperature": np.float64(0.5)}, "temperature must be float"),  # msgspec takes Python's own numbers alone
    ],
)
def test_sampling_rules_that_make_no_sense_are_refused_by_name(rules: dict[str, Any], words: str) -> None:
    """Bug: TypeErrors from inside a step, or a negative top_k that is taken for none."""
    with pytest.raises(ValueError, match=words):
        Sampling(**{"max_tokens": 8, **rules})


def test_what_comes_over_the_wire_is_checked_too() -> None:
    with pytest.raises(msgspec.ValidationError, match="min_tokens 9 is more"):
        msgspec.msgpack.decode(msgspec.msgpack.encode({"max_tokens": 8, "min_tokens": 9}), type=Sampling)


def test_every_number_is_taken_for_what_it_is() -> None:
    """Bug: the integer 1 refused where 1.0 is meant, or a bias of minus infinity, which bans a token."""
    sampling = Sampling(max_tokens=0, temperature=1, top_k=-1, logit_bias={3: float("-inf")}, seed=-1)
    assert sampling.temperature == 1


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({"kv_memory": "4GiB"}, r"kv_memory must be int >= 1 \(bytes\) \| None; found '4GiB'"),
        ({"kv_memory": 0}, "kv_memory must be int >= 1"),
        ({"swap_memory": -1}, r"swap_memory must be int >= 0 \(bytes\); found -1"),
        ({"max_num_seqs": "8"}, "max_num_seqs must be int >= 1; found '8'"),
        ({"max_num_seqs": 0}, "max_num_seqs must be int >= 1; found 0"),
        ({"threads": -1}, r"threads must be int >= 1 \| None; found -1"),
        ({"kv_request_window": -1}, "kv_request_window must be int >= 0; found -1"),
        ({"prefix_caching": "no"}, "prefix_caching must be bool; found 'no'"),
        ({"activations": "bf16"}, r"activations must be 'float' \| 'int8'; found 'bf16'"),
        ({"head_bits": 4}, r"head_bits must be 8 \| 16; found 4"),
        ({"device": "gpu"}, r"device must be 'auto' \| 'cpu' \| 'cuda'; found 'gpu'"),
        ({"kernel": 5}, "kernel must be str; found 5"),
        ({"model": "x" * 500, "kernel": b"x" * 500}, r"kernel must be str; found .{60,100}$"),
    ],
)
def test_settings_of_another_type_are_refused_by_name(wishes: dict[str, Any], words: str) -> None:
    """Bug: accepted and ignored ("no" is true), or a TypeError that names neither setting nor value."""
    with pytest.raises(ValueError, match=words):
        EngineConfig(**{"model": "m", **wishes})
