"""Old names of :mod:`smaflib.processes`, until their last users have moved."""

from smaflib.processes import barrier as wait_for_all
from smaflib.processes import missing_files as missing_here

__all__ = ["missing_here", "wait_for_all"]
