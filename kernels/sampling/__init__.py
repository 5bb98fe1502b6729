"""What is computed from one row of logits: the largest, a draw, log-probabilities."""

from kernels.contract import SamplingKernel
from kernels.sampling.native import SamplingNative
from kernels.sampling.reference import SamplingReference

KERNELS: tuple[SamplingKernel, ...] = (SamplingNative(), SamplingReference())  # fastest first
