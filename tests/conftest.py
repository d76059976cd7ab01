"""Settings of the whole test run."""

import os

import torch
from hypothesis import settings

# One thread: sums in one order, and threads that wait for each other on busy cores take ten times as long.
torch.set_num_threads(1)

# No deadline: the first call of a torch kernel is slow. In CI the examples are the same every time.
settings.register_profile("smaflib", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("smaflib")
