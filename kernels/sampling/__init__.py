"""What is computed from one row of logits: the largest, a draw, log-probabilities."""

from kernels.contract import SamplingKernel, StepSamplingKernel
from kernels.sampling.gpu import SamplingTriton
from kernels.sampling.native import SamplingNative
from kernels.sampling.reference import SamplingReference

KERNELS: tuple[SamplingKernel, ...] = (SamplingNative(), SamplingReference())  # of rows on the CPU, fastest first
ON_GPU: StepSamplingKernel = SamplingTriton()
