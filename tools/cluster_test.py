"""A sweep on a real Slurm of two nodes, on this machine: one node goes down in the middle, a job is cancelled.

    make cluster-test

Slurm puts the lost node's job back into its queue, so that it goes on where it stopped, on the other node; the same
command then resumes what was cancelled. Linux with Debian's ``slurm-wlm`` and ``munge``. Its own munged, slurmctld and
two slurmd run from a temporary folder, on the loopback device and on free ports; no file outside that folder is
written, and it is gone afterwards. Ends with status 1 where a file of the cluster's runs is not, byte for byte, that of
a local sweep.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from smaflib.distributed.launch import end_process
from smaflib.files import PROJECT_ROOT, duration
from smaflib.runs.manifest import read_manifest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo", "snakemake")
START_SECONDS, REQUEUE_SECONDS, SWEEP_SECONDS = 60.0, 120.0, 1800.0
NODES = ("one", "two")

CONFIG = """ClusterName=smaftest
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdParameters=config_overrides
ReturnToService=0
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
KillWait=15
PartitionName=tiny Nodes=ALL Default=YES MaxTime=30 State=UP
"""
"""A requeued job waits until the credentials of its first start have expired, two minutes by default: here 5 s."""

NODE = "NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory=1000 State=UNKNOWN\n"

TINY = [
    "num_threads=1",
    "data.num_train=8",
    "data.num_val=4",
    "data.image_size=64",
    "classifier.iterations=40",
    "classifier.checkpoint_minutes=0",
    "classifier.crop_size=48",
    "classifier.resize_range=[48,72]",
]
TIMED = (".ipynb", ".html", ".lock", ".settings")
"""Endings of files that hold times or are empty: not compared, nor is ``manifest.json``."""


@contextlib.contextmanager
def running(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process, such as a daemon in the foreground, that is ended with the block."""
    with log.open("w") as output:
        # A session of its own: Ctrl-C must not end the daemons before their jobs are cancelled.
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, cwd=PROJECT_ROOT, start_new_session=True
        )
    try:
        yield process
    finally:
        end_process(process)


def free_port() -> int:
    """A port of the loopback device that nobody listens to."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """A cluster of two nodes, both of them this machine, with a core each.

    Args:
        folder: takes its files; munge wants it readable by its owner alone.

    Yields:
        The environment that its commands need.
    """
    for name in ("state", *(f"spool/{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    key, host = folder / "munge.key", platform.node().partition(".")[0]
    key.write_bytes(secrets.token_bytes(256))
    key.chmod(0o600)
    config = folder / "slurm.conf"
    nodes = "".join(NODE.format(node=node, host=host, port=free_port()) for node in NODES)
    config.write_text(nodes + CONFIG.format(host=host, user=getpass.getuser(), folder=folder, port=free_port()))
    environment = os.environ | {"SLURM_CONF": str(config)}
    # Inside a job the plug-in calls srun without Slurm's variables, so that it would look for a file under /etc.
    wrapper = folder / "bin" / "srun"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nSLURM_CONF={config} exec {shutil.which("srun")} "$@"\n')
    wrapper.chmod(0o755)
    environment["PATH"] = f"{wrapper.parent}{os.pathsep}{environment['PATH']}"
    paths = [f"--{name}-file={folder / f'munge.{name}'}" for name in ("key", "pid", "log", "seed")]
    munged = ["munged", "--foreground", "--force", f"--socket={folder / 'munge.socket'}", *paths]
    with contextlib.ExitStack() as stack:
        stack.enter_context(running(munged, folder / "munged.log", environment))
        wait_until(lambda: (folder / "munge.socket").exists(), "munged", START_SECONDS)
        stack.enter_context(running(["slurmctld", "-D"], folder / "slurmctld.log", environment))
        for node in NODES:
            stack.enter_context(running(["slurmd", "-D", "-N", node], folder / f"{node}.log", environment))
        states = ["sinfo", "-h", "-N", "-o", "%T"]
        wait_until(lambda: ask(states, environment).split() == ["idle"] * len(NODES), "slurmd", START_SECONDS)
        stack.callback(end_jobs, environment)  # they would outlive slurmd
        yield environment


def end_jobs(environment: Mapping[str, str]) -> None:
    """Cancel what runs or waits, and wait for its end; nothing where all is done."""
    if ask(["squeue", "-h"], environment):
        ask(["scancel", f"--user={getpass.getuser()}"], environment)
        wait_until(lambda: not ask(["squeue", "-h"], environment), "the end of cancelled jobs", START_SECONDS)


def wait_until(condition: Callable[[], bool], what: str, seconds: float) -> None:
    """Return once the condition holds.

    Raises:
        SystemExit: if it does not in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"{what} was waited for in vain, {duration(seconds)}")
        time.sleep(0.2)


def ask(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """What a command of Slurm prints; nothing if it fails."""
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stdout


def write_profile(folder: Path) -> Path:
    """The profile ``slurm``, edited as its comments say, for a small cluster without GPUs."""
    profile = yaml.safe_load((PROJECT_ROOT / "workflow" / "profiles" / "slurm" / "config.yaml").read_text())
    del profile["set-resources"]
    profile["default-resources"] |= {"slurm_partition": "tiny", "runtime": 20, "mem_mb": 900}
    profile["set-threads"] = dict.fromkeys(profile["set-threads"], 1)
    profile |= {"slurm-no-account": True, "slurm-status-command": "squeue", "latency-wait": 10}
    # Jobs of seconds; of real ones it is 40. Each question that finds no job ended makes the next one 10 s later.
    profile["slurm-init-seconds-before-status-checks"] = 7
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(profile))
    return folder


def sweep_command(out: Path, *options: str) -> list[str]:
    """Two seeds by two settings of a tiny run, as far as the attention maps."""
    words = ["sweep", "configs/mini.yaml", "--seeds", "0-1", "--grid", "attention.fusion=sum,max", "--until", "03"]
    settings = [word for setting in TINY for word in ("--set", setting)]
    return [sys.executable, "-m", "smaflib", *words, *settings, "--out", str(out), *options]


def sweep_with_losses(command: Sequence[str], out: Path, environment: Mapping[str, str]) -> None:
    """Start a sweep, take a node down once a network has been half trained, cancel the other job; wait for its end.

    Raises:
        SystemExit: if it does not end as one that has lost jobs, or the lost node's job does not go on elsewhere.
    """
    process = subprocess.Popen(command, env=environment, cwd=PROJECT_ROOT)
    try:
        half = "*/checkpoints/teacher*"
        wait_until(lambda: any(out.glob(half)) or process.poll() is not None, "a checkpoint", SWEEP_SECONDS)
        jobs = [
            line.split() for line in ask(["squeue", "-h", "-t", "running", "-o", "%i %N"], environment).splitlines()
        ]
        if len(jobs) != len(NODES):
            sys.exit(f"a job on each node was expected, got {jobs}")
        (job, node), (cancelled, _) = jobs
        change = ["scontrol", "update", f"NodeName={node}"]
        print(f"in the middle: node {node} goes down with job {job}, job {cancelled} is cancelled", flush=True)
        call([*change, "State=DOWN", "Reason=test"], environment)
        call(["scancel", cancelled], environment)
        wait_until(lambda: goes_on(job, node, environment), f"job {job} on another node", REQUEUE_SECONDS)
        call([*change, "State=RESUME"], environment)
        print(f"job {job} goes on, on another node", flush=True)
        status = process.wait(timeout=SWEEP_SECONDS)
    finally:
        end_process(process)  # it ends Snakemake, which cancels its jobs
    if status != 1:
        sys.exit(f"the sweep that lost a job ended with status {status}; 1 was expected, of failed runs")


def sweep_to_its_end(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """The same sweep again.

    Raises:
        SystemExit: if runs fail.
    """
    process = subprocess.Popen(command, env=environment, cwd=PROJECT_ROOT)
    try:
        if status := process.wait(timeout=SWEEP_SECONDS):
            sys.exit(f"the same command again ended with status {status}")
    finally:
        end_process(process)


def goes_on(job: str, lost: str, environment: Mapping[str, str]) -> bool:
    """Whether Slurm has started a job again, on another node."""
    facts = dict(word.partition("=")[::2] for word in ask(["scontrol", "show", "job", job], environment).split())
    return (facts.get("Restarts"), facts.get("JobState")) == ("1", "RUNNING") and facts.get("NodeList") != lost


def call(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """A command of Slurm that must work."""
    subprocess.run(command, env=environment, check=True, timeout=60)


def contents(out: Path) -> dict[str, str]:
    """Hashes of the files of a sweep that are the same wherever it was made."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        hidden = any(part.startswith(".") for part in path.relative_to(out).parts)
        if path.is_file() and not hidden and path.suffix not in TIMED and path.name != "manifest.json":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def main() -> None:
    """Run the test; the last line says how it went."""
    if absent := [name for name in PROGRAMS if shutil.which(name) is None]:
        sys.exit(
            f"{', '.join(absent)} not found; as root on Debian: apt-get install slurm-wlm munge, then make cluster-test"
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # daemons and folder go with this process
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="smaf-cluster-") as name:
        folder = Path(name)
        cluster, local = folder / "cluster", folder / "local"
        (folder / "slurm").mkdir(mode=0o700)
        command = sweep_command(cluster, "--shards", "2", "--profile", str(write_profile(folder / "profile")))
        # Beside the cluster, which waits for its queue most of the time.
        with running(sweep_command(local), folder / "local.log", os.environ) as alone:
            with slurm(folder / "slurm") as environment:
                sweep_with_losses(command, cluster, environment)
                sweep_to_its_end(command, environment)
                left = ask(["squeue", "-h"], environment)
            if alone.wait(timeout=SWEEP_SECONDS):
                sys.exit(f"the local sweep failed:\n{(folder / 'local.log').read_text()}")
        made, expected = contents(cluster), contents(local)
        taken_over = sum(
            "reused_from" in entry for path in cluster.glob("seed*") for entry in read_manifest(path)["stages"].values()
        )
    different = sorted(key for key in made.keys() | expected.keys() if made.get(key) != expected.get(key))
    if different or left:
        sys.exit(f"differs from the local sweep: {', '.join(different[:10]) or 'nothing'}; jobs left: {left or 'none'}")
    print(
        f"\n{len(made)} files of 4 runs are those of the local sweep, byte for byte; {taken_over} stages were taken "
        f"over; {duration(time.monotonic() - begun)}"
    )


if __name__ == "__main__":
    main()
