"""Runs: folders that hold what the chain made, and the manifest that proves it."""

from smaflib.runs.run import Run, find_run, open_run, read_run

__all__ = ["Run", "find_run", "open_run", "read_run"]
