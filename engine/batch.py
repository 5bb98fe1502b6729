"""What one forward pass reads."""

from dataclasses import dataclass

from torch import Tensor

from kernels.contract import AttentionInputs


@dataclass(frozen=True)
class Batch:
    """The rows of one step: chunks of prompts and single decode tokens of several sequences, one after the other."""

    input_ids: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64
    attention: AttentionInputs
    logit_rows: Tensor  # [num_logits] int64, the rows whose next-token logits are wanted
