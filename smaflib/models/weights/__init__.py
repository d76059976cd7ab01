"""Weights files: reading them without running code, and saying what they are."""
