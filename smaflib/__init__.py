"""smaflib: multi-scale attention fusion and self-training for weakly supervised semantic segmentation.

The modules stand in pipeline order; DESIGN.md, section 2, and notebook 00 walk through them line by line.
"""

__version__ = "0.1.0"
