"""Kill, stop and starve ``smaf run`` and ``smaf masks`` at random moments; what they leave must be the same bytes.

    python benchmarks/kill.py --kills 50

Linux, as root: the work lies on a small file system in memory (tmpfs), which is filled up and made read-only too. Each
command is disturbed again and again, started anew after each death, and its folder compared file by file with that of a
command that nobody disturbed. Ends with status 1 at the first difference. Results go to results/kill.json, the table
to docs/robustness.md.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smaflib.files import PROJECT_ROOT, read_json, write_json
from smaflib.report.markdown import fill_page, markdown_table
from smaflib.runs.environment import git_state

RESULTS, PAGE = PROJECT_ROOT / "benchmarks" / "results" / "kill.json", PROJECT_ROOT / "docs" / "robustness.md"
MARK = "SMAF_KILL_MARK"
DISK = "192m"
"""A run of these settings takes a tenth of it."""

TINY = (
    "num_threads=1",
    "data.num_train=16",
    "data.num_val=8",
    "data.image_size=64",
    "pseudo_masks.num_workers=2",
    "self_training.control=true",
    *(
        f"{stage}.{setting}"
        for stage, iterations in (("classifier", 40), ("self_training", 20), ("segmentation", 20))
        for setting in (
            f"iterations={iterations}",
            "checkpoint_minutes=0",
            "crop_size=48",
            "resize_range=[48, 72]",
        )
    ),
)
TIMED = (".ipynb", ".html", ".lock", ".settings")
"""Endings of files that hold times or are empty: not compared, nor is ``manifest.json``."""


@dataclass(frozen=True)
class Work:
    """A command over a folder.

    Attributes:
        name: of the row.
        words: of ``smaf``, given the folder.
        has_kernels: whether notebooks run in kernels of their own.
    """

    name: str
    words: Callable[[Path], list[str]]
    has_kernels: bool


def run_words(folder: Path) -> list[str]:
    settings = [word for setting in TINY for word in ("--set", setting)]
    return ["run", "configs/mini.yaml", "--name", "killed", "--runs", str(folder), *settings]


def masks_words(photos: Path) -> Callable[[Path], list[str]]:
    settings = ("num_threads=1", "pseudo_masks.num_workers=2", "seed=0")
    given = [word for setting in settings for word in ("--set", setting)]
    return lambda folder: [
        *("masks", "--images", str(photos / "JPEGImages"), "--labels", str(photos / "labels.csv")),
        *("--out", str(folder / "masks"), *given),
    ]


# ------------------------------------------------------------------------------------------------------------- faults


class Victim:
    """A command that was started, with all processes that came of it: they inherit a mark in their environment."""

    def __init__(self, words: Sequence[str]) -> None:
        self.mark = uuid.uuid4().hex
        environment = os.environ | {MARK: self.mark}
        command = [sys.executable, "-m", "smaflib", *words]
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            command, cwd=PROJECT_ROOT, env=environment, stdout=self.log, stderr=self.log, start_new_session=True
        )

    def processes(self) -> dict[int, str]:
        """Living processes of the command, with their command lines."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):  # it ends while it is looked at
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                    if state != "Z" and f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes():
                        found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def kernels(self) -> list[int]:
        """The kernel that works: a spare one beside it waits for the next notebook."""
        kernels = [
            pid for pid, line in self.processes().items() if "ipykernel" in line or "smaflib.runs.kernel" in line
        ]
        return sorted(kernels, key=cpu_ticks)[-1:]

    def workers(self) -> list[int]:
        """Processes of a pool or a loader."""
        found = self.processes().items()
        return [pid for pid, line in found if "multiprocessing" in line or "spawn_main" in line]

    def is_running(self) -> bool:
        return self.process.poll() is None

    def wait_until(self, condition: Callable[[], bool], seconds: float = 120) -> bool:
        """Wait for a state; False if it does not come in time or the command ends before."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.is_running():
            if condition():
                return True
            time.sleep(0.02)
        return False

    def end(self) -> int:
        """Wait for the end of the command and of all that came of it; gives the number of processes that stayed."""
        self.process.wait(timeout=600)
        until = time.monotonic() + 90  # idle workers wait a minute for another call, unless their parent has gone
        while (left := self.processes()) and time.monotonic() < until:
            time.sleep(0.1)
        for pid in left:
            kill([pid])
        return len(left)

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors="replace")[-2000:]


def cpu_ticks(process: int) -> int:
    """What a process has computed so far; 0 if it is gone."""
    with contextlib.suppress(OSError):
        return sum(map(int, Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return 0


def kill(processes: Sequence[int], signum: signal.Signals = signal.SIGKILL) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signum)


def kill_runner(victim: Victim, disk: Path) -> bool:
    kill([victim.process.pid])
    return True


def kill_one_of(which: Callable[[Victim], list[int]]) -> Callable[[Victim, Path], bool]:
    def strike(victim: Victim, disk: Path) -> bool:
        if not victim.wait_until(lambda: bool(which(victim))):
            return False
        kill(random.sample(which(victim), 1) if which(victim) else [])
        return True

    return strike


def kill_group(victim: Victim, disk: Path) -> bool:
    kill([*victim.processes()])
    return True


def pause(victim: Victim, disk: Path) -> bool:
    """All processes stand still for a while, as when a laptop sleeps."""
    stopped = [*victim.processes()]
    kill(stopped, signal.SIGSTOP)
    time.sleep(2)
    kill(stopped, signal.SIGCONT)
    return True


def fill_disk(victim: Victim, disk: Path) -> bool:
    """No byte is left until the command ends, or for a while."""
    filler = disk / "filler"
    try:
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 2**16)
        with contextlib.suppress(subprocess.TimeoutExpired):
            victim.process.wait(timeout=20)
    finally:
        filler.unlink(missing_ok=True)
    return True


def make_read_only(victim: Victim, disk: Path) -> bool:
    """The folder cannot be written until the command ends, or for a while."""
    folder = next((path for path in disk.iterdir() if path.is_dir()), None)
    if folder is None:
        return False
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            victim.process.wait(timeout=20)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
    return True


FAULTS: dict[str, Callable[[Victim, Path], bool]] = {
    "the command is killed": kill_runner,
    "a notebook's kernel is killed": kill_one_of(Victim.kernels),
    "a worker process is killed": kill_one_of(Victim.workers),
    "all its processes are killed at once": kill_group,
    "all are stopped for two seconds": pause,
    "the disk is full": fill_disk,
    "the folder turns read-only": make_read_only,
}


# ------------------------------------------------------------------------------------------------------------ comparing


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder that holds no times, with its hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(TIMED) and path.name not in ("manifest.json", ".lock-holder.json")
    }


def differences(folder: Path, expected: dict[str, str]) -> list[str]:
    """Names of files that are missing, are not the same, or are there without reason."""
    found = contents(folder)
    return sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))


@contextlib.contextmanager
def small_disk() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="smaf-kill-"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        folder.rmdir()


def undisturbed(work: Work, disk: Path) -> tuple[dict[str, str], float]:
    """What the command leaves by itself, and its seconds."""
    folder, start = disk / "work", time.monotonic()
    victim = Victim(work.words(folder))
    victim.end()
    if victim.process.returncode:
        raise SystemExit(f"{work.name} fails by itself:\n{victim.said()}")
    expected, taken = contents(folder), time.monotonic() - start
    shutil.rmtree(folder)
    return expected, taken


def disturb(work: Work, kills: int, disk: Path, generator: random.Random) -> tuple[list[dict[str, Any]], int]:
    """Disturb a command ``kills`` times, in as many folders as that takes; gives a record per fault, and the files.

    Raises:
        SystemExit: at the first folder that is not the same bytes, naming the files.
    """
    expected, seconds = undisturbed(work, disk)
    again, _ = undisturbed(work, disk)
    if again != expected:
        names = [name for name in expected if expected[name] != again.get(name)]
        raise SystemExit(f"{work.name}: two undisturbed commands differ in {names[:10]}")
    print(f"{work.name}: {seconds:.0f} s undisturbed, {len(expected)} files", file=sys.stderr, flush=True)
    kinds = [kind for kind in FAULTS if work.has_kernels or "kernel" not in kind]
    records: list[dict[str, Any]] = []
    folder = disk / "work"
    while len(records) < kills:
        victim, here, finished = Victim(work.words(folder)), len(records), False
        while not finished:
            kind = kinds[len(records) % len(kinds)]
            if len(records) - here < 4 and len(records) < kills:
                victim.wait_until(lambda: False, generator.uniform(0.5, seconds * 0.7))
                struck = victim.is_running() and FAULTS[kind](victim, disk)
            else:
                struck = False  # left alone until it is done
            left = victim.end()
            if struck:
                died = victim.process.returncode != 0
                records.append({"work": work.name, "fault": kind, "died": died, "processes left": left})
                print(
                    f"{len(records):3} {work.name}, {kind}: {'died' if died else 'went on'}",
                    file=sys.stderr,
                    flush=True,
                )
            finished = victim.process.returncode == 0
            if not finished:
                if not struck:
                    raise SystemExit(f"{work.name} does not resume:\n{victim.said()}")
                victim = Victim(work.words(folder))
        if wrong := differences(folder, expected):
            raise SystemExit(f"{work.name}: {len(wrong)} files differ after {records[here:]}: {wrong[:10]}")
        for record in records[here:]:
            record["identical"] = True
        shutil.rmtree(folder)
    return records, len(expected)


def markdown(result: dict[str, Any]) -> str:
    """A row per fault: how often, how often the command died of it, and whether its files came out the same."""
    lines = []
    for fault in FAULTS:
        row = [fault]
        for work in result["files"]:
            records = [each for each in result["records"] if (each["work"], each["fault"]) == (work, fault)]
            died, same = sum(each["died"] for each in records), sum(each["identical"] for each in records)
            row.append(f"{len(records)} times, {died} died, {same} the same" if records else "")
        lines.append(row)
    totals = [sum(each["work"] == work for each in result["records"]) for work in result["files"]]
    identical = [
        sum(each["work"] == work and each["identical"] for each in result["records"]) for work in result["files"]
    ]
    lines.append(["all", *(f"{same} of {total} the same" for same, total in zip(identical, totals, strict=True))])
    left = sum(each["processes left"] for each in result["records"])
    names = [f"`{name}`, {number} files" for name, number in result["files"].items()]
    table = markdown_table(["at a random moment", *names], lines)
    return f"{table}\n\nProcesses that stayed behind: {left}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each command")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", choices=("smaf run", "smaf masks"), help="and keep what is known of the other")
    arguments = parser.parse_args()
    if sys.platform != "linux" or os.geteuid() != 0:
        parser.error("needs Linux and root: it mounts a small file system, fills it up and makes it read-only")
    generator = random.Random(arguments.seed)
    random.seed(arguments.seed)
    result: dict[str, Any] = read_json(RESULTS, {}) or {"records": [], "files": {}}
    result |= {"command": f"python benchmarks/kill.py --kills {arguments.kills}"}
    result |= {"date": datetime.date.today().isoformat()} | git_state()
    with tempfile.TemporaryDirectory() as photos, small_disk() as disk:
        make_photos(Path(photos))
        works = (Work("smaf run", run_words, True), Work("smaf masks", masks_words(Path(photos)), False))
        for work in (each for each in works if arguments.only in (None, each.name)):
            records, number = disturb(work, arguments.kills, disk, generator)
            result["records"] = [each for each in result["records"] if each["work"] != work.name] + records
            result["files"] = {
                each.name: number if each is work else result["files"].get(each.name, 0) for each in works
            }
    write_json(RESULTS, result)
    fill_page(PAGE, "benchmarks/kill.py", {"kills": markdown(read_json(RESULTS, {}))})
    print(markdown(result))


def make_photos(folder: Path) -> None:
    """Sixteen drawn images and a table of what they show."""
    from smaflib.config import load_config
    from smaflib.data import load_samples, make_data

    settings = ["data.num_train=16", "data.num_val=1", "data.image_size=160"]
    config = load_config(PROJECT_ROOT / "configs" / "mini.yaml", settings)
    make_data(config, folder)
    samples = load_samples(config, "train", folder)
    images = folder / "JPEGImages"
    images.mkdir(exist_ok=True)
    lines = ["image,labels"]
    for file in samples.files:
        shutil.copy(file.image, images / file.image.name)
        lines.append(f"{file.image.name},{';'.join(samples.class_names[label] for label in file.labels)}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
