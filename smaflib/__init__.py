"""smaflib: multi-scale attention fusion and self-training for weakly supervised semantic segmentation.

The modules stand in pipeline order; notebook 00 and the README walk through them line by line.
"""

import os

__version__ = "0.1.0"

# Read when torch is imported: how long OpenMP's threads spin while they wait for each other before they sleep. Two
# threads on two cores, a training step of the mini classifier: 20000 rounds take 0.04 s alone and 0.4 s beside a second
# job; five times as many 1.2 s beside it; sleeping at once 0.08 s alone and 0.14 s beside it.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
