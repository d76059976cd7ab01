"""What ``tools/cluster_test.py`` still needs."""

import subprocess


def end_process(process: subprocess.Popen[bytes]) -> None:
    """End a process; kill it if it has not ended after 45 s."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=45)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
