"""Settings of the whole test run."""

import os

import torch
from hypothesis import settings

# As many threads as CI has cores: sums in another order give other last digits.
torch.set_num_threads(2)

# No deadline: the first call of a torch kernel is slow. In CI the examples are the same every time.
settings.register_profile("smaflib", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("smaflib")
