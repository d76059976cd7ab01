"""Old names of :mod:`smaflib.processes`, until their last users have moved."""
