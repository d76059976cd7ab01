"""An IPython kernel that does not outlive the runner: ``python -m smaflib.kernel -f <connection file>``.

ipykernel ends a kernel whose parent was killed, but not the worker processes that the kernel started.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time


def follow_parent(interval: float = 0.5) -> None:
    """Kill this process group, workers included, once the parent process is gone; checked every ``interval`` s."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(interval)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="follow_parent").start()


if __name__ == "__main__":
    from ipykernel.kernelapp import launch_new_instance

    if os.getpgrp() == os.getpid():  # never a group that others belong to
        follow_parent()
    faulthandler.enable(os.dup(2), all_threads=False)  # ipykernel puts a pipe in place of 2, which dies with it
    launch_new_instance()
