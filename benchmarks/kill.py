"""Kill ``smaf run`` at random moments; what it leaves in the end must be the same bytes as of an undisturbed run.

    python benchmarks/kill.py --kills 50

Each run is killed up to four times and started again after each death, then compared file by file. Ends with status 1
at the first difference. Linux; as root also with a full disk and a read-only folder, on a small file system in memory.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from smaflib.files import PROJECT_ROOT
from smaflib.runs.environment import git_state

MARK = "SMAF_KILL_MARK"
DISK = "192m"
"""Ten times what a run takes."""

KILLS_PER_RUN = 4
SETTINGS = [
    "num_threads=1",
    "data.num_train=16",
    "data.num_val=8",
    "data.image_size=64",
    "pseudo_masks.num_workers=2",
    "self_training.control=true",
    *(
        f"{stage}.{setting}"
        for stage, iterations in (("classifier", 40), ("self_training", 20), ("segmentation", 20))
        for setting in (f"iterations={iterations}", "checkpoint_minutes=0.01", "crop_size=48", "resize_range=[48, 72]")
    ),
]
TIMED = (".ipynb", ".html", ".lock", "manifest.json")
"""Endings of files that hold times or are empty: not compared."""


class Victim:
    """A running command with all its processes: they inherit a mark in their environment."""

    def __init__(self, disk: Path) -> None:
        self.mark, self.disk = uuid.uuid4().hex, disk
        command = [sys.executable, "-m", "smaflib", "run", "configs/mini.yaml", "--name", "run", "--runs", str(disk)]
        command += [word for setting in SETTINGS for word in ("--set", setting)]
        self.log = tempfile.TemporaryFile()
        environment = os.environ | {MARK: self.mark}
        self.process = subprocess.Popen(
            command, cwd=PROJECT_ROOT, env=environment, stdout=self.log, stderr=self.log, start_new_session=True
        )

    def processes(self) -> dict[int, str]:
        """Command lines of all living processes by process id."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):  # it ends at this moment
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                    if state != "Z" and f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes():
                        found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def is_running(self) -> bool:
        return self.process.poll() is None

    def end(self) -> int:
        """Wait for the end of all processes; returns how many stayed behind and had to be killed."""
        self.process.wait(timeout=1800)
        deadline = time.monotonic() + 90  # idle workers wait a minute for another call
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        kill(*left)
        return len(left)

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors="replace")[-2000:]


def kill(*pids: int, signum: signal.Signals = signal.SIGKILL) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


# ------------------------------------------------------------------------------------------------------------- faults


def kill_runner(victim: Victim) -> None:
    kill(victim.process.pid)


def kill_one(words: str) -> Callable[[Victim], bool]:
    """Kill one process with ``words`` in its command line, as soon as there is one; False if none came."""

    def strike(victim: Victim) -> bool:
        while victim.is_running():
            if chosen := [pid for pid, line in victim.processes().items() if words in line]:
                kill(random.choice(chosen))
                return True
            time.sleep(0.02)
        return False

    return strike


def kill_all(victim: Victim) -> None:
    kill(*victim.processes())


def pause(victim: Victim) -> None:
    """Stop all processes for a while, as when a laptop sleeps."""
    stopped = victim.processes()
    kill(*stopped, signum=signal.SIGSTOP)
    time.sleep(2)
    kill(*stopped, signum=signal.SIGCONT)


def fill_disk(victim: Victim) -> None:
    """Leave no free byte until the command ends, or for a while."""
    filler = victim.disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 2**16)
    with contextlib.suppress(subprocess.TimeoutExpired):
        victim.process.wait(timeout=20)
    filler.unlink()


def make_read_only(victim: Victim) -> None:
    """Make the run folder read-only until the command ends, or for a while."""
    folder = victim.disk / "run"
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
    with contextlib.suppress(subprocess.TimeoutExpired):
        victim.process.wait(timeout=20)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


FAULTS: dict[str, Callable[[Victim], bool | None]] = {
    "the command is killed": kill_runner,
    "a notebook's kernel is killed": kill_one("smaflib.runs.kernel"),
    "a worker process is killed": kill_one("multiprocessing"),
    "all its processes are killed at once": kill_all,
    "all are stopped for two seconds": pause,
}
AS_ROOT = {"the disk is full": fill_disk, "the folder turns read-only": make_read_only}


# ------------------------------------------------------------------------------------------------------------ the test


def contents(folder: Path) -> dict[str, str]:
    """Hashes of the files below a folder that hold no times."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(TIMED)
    }


@contextlib.contextmanager
def work_folder(as_root: bool) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="smaf-kill-") as name:
        if as_root:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", name], check=True)
        try:
            yield Path(name)
        finally:
            if as_root:
                subprocess.run(["umount", "--lazy", name], check=True)


def undisturbed(disk: Path) -> tuple[dict[str, str], float]:
    """What a run leaves by itself, and its seconds."""
    start, victim = time.monotonic(), Victim(disk)
    victim.end()
    if victim.process.returncode:
        raise SystemExit(f"the run fails by itself:\n{victim.said()}")
    expected = contents(disk / "run")
    shutil.rmtree(disk / "run")
    return expected, time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    as_root = os.geteuid() == 0
    faults = list((FAULTS | (AS_ROOT if as_root else {})).items())
    struck: Counter[str] = Counter()
    died: Counter[str] = Counter()
    stayed = 0
    with work_folder(as_root) as disk:
        expected, seconds = undisturbed(disk)
        print(f"{len(expected)} files in {seconds:.0f} s without a kill", flush=True)
        while struck.total() < arguments.kills:
            for attempt in range(KILLS_PER_RUN + 1):
                victim, number = Victim(disk), struck.total()
                if attempt < KILLS_PER_RUN and number < arguments.kills:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        victim.process.wait(timeout=random.uniform(0.5, seconds * 0.7))
                if victim.is_running() and attempt < KILLS_PER_RUN and number < arguments.kills:
                    name, strike = faults[number % len(faults)]
                    if strike(victim) is not False:
                        struck[name] += 1
                        stayed += victim.end()
                        died[name] += bool(victim.process.returncode)
                        print(f"{number + 1}: {name}", "died" if victim.process.returncode else "went on", flush=True)
                stayed += victim.end()
                if victim.process.returncode == 0:
                    break
            found = contents(disk / "run")
            if wrong := sorted(name for name in found | expected if found.get(name) != expected.get(name)):
                raise SystemExit(f"{len(wrong)} files differ: {wrong[:10]}\n{victim.said()}")
            shutil.rmtree(disk / "run")
    print(f"\n{len(expected)} files the same after each run; commit {git_state()['git_commit']}")
    print(*(f"| {name} | {struck[name]} times, {died[name]} died |" for name, _ in faults), sep="\n")
    print(f"processes that stayed behind: {stayed}")


if __name__ == "__main__":
    main()
