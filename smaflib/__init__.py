"""smaflib: multi-scale attention fusion and self-training for weakly supervised semantic segmentation.

The modules stand in pipeline order; notebook 00 and the README walk through them line by line.
"""

import os

__version__ = "0.1.0"

# Read when torch is imported. By default OpenMP's threads spin while they wait for each other: on two cores with other
# work a training step took 0.95 s that takes 0.14 s with sleeping threads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
