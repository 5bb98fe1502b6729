"""Settings for every test."""

import torch

# The matrices of tests are tiny: a second thread waits more than it helps, and results do not depend on the machine.
torch.set_num_threads(1)
