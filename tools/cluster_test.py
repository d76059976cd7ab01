"""A sweep on a real Slurm of two nodes, on this machine: one node goes down, a job is cancelled.

    make cluster-test

Slurm requeues the job of the lost node, which resumes on the other node; the same command resumes what was cancelled.
Needs Debian's ``slurm-wlm`` and ``munge``. munged, slurmctld and two slurmd run from a temporary folder, on loopback
ports. Ends with status 1 if a file of the runs differs from that of a local sweep.
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

from smaflib.files import PROJECT_ROOT
from smaflib.runs.manifest import read_manifest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
NODES = ("one", "two")

# A requeued job waits until the credentials of its first start have expired: here 5 s, by default two minutes.
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
MinJobAge=3600
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
KillWait=15
PartitionName=tiny Nodes=ALL Default=YES MaxTime=30 State=UP
"""
NODE = "NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory=1000 State=UNKNOWN\n"

# submitit asks sacct how jobs ended; without a data base for accounting, squeue knows it too.
SACCT = """#!/bin/sh
echo "JobID|State|NodeList"
exec squeue -h -r -t all -o "%i|%T|%N"
"""

SWEEP = "sweep configs/mini.yaml --seeds 0-1 --grid attention.fusion=sum,max --until 03".split()
SETTINGS = (
    "num_threads=1",
    "data.num_train=8",
    "data.num_val=4",
    "data.image_size=64",
    "classifier.iterations=40",
    "classifier.checkpoint_minutes=0.001",
    "classifier.crop_size=48",
    "classifier.resize_range=[48,72]",
)
CLUSTER = "--cluster slurm --slurm partition=tiny --slurm time=20 --slurm mem=900M --slurm cpus_per_task=1".split()
VARYING = (".ipynb", ".html", ".lock", ".tsv", ".log")
"""Endings of files that hold times or nothing; they are not compared, nor is ``manifest.json``."""


@contextlib.contextmanager
def running(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended with the block."""
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=15)
        process.kill()


def free_port() -> int:
    """A free port of the loopback device."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """A cluster of two nodes, both of them this machine, with a core each; yields the environment of its commands."""
    for name in ("bin", "state", *(f"spool/{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    key, host = folder / "munge.key", platform.node().partition(".")[0]
    key.write_bytes(secrets.token_bytes(256))
    key.chmod(0o600)
    (folder / "bin" / "sacct").write_text(SACCT)
    (folder / "bin" / "sacct").chmod(0o755)
    config = folder / "slurm.conf"
    nodes = "".join(NODE.format(node=node, host=host, port=free_port()) for node in NODES)
    config.write_text(nodes + CONFIG.format(host=host, user=getpass.getuser(), folder=folder, port=free_port()))
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"SLURM_CONF": str(config), "PATH": path}
    paths = [f"--{name}-file={folder / f'munge.{name}'}" for name in ("key", "pid", "log", "seed")]
    munged = ["munged", "--foreground", "--force", f"--socket={folder / 'munge.socket'}", *paths]
    with contextlib.ExitStack() as stack:
        stack.enter_context(running(munged, folder / "munged.log", environment))
        wait_until((folder / "munge.socket").exists, "munged")
        stack.enter_context(running(["slurmctld", "-D"], folder / "slurmctld.log", environment))
        for node in NODES:
            stack.enter_context(running(["slurmd", "-D", "-N", node], folder / f"{node}.log", environment))
        states = ("sinfo", "-h", "-N", "-o", "%T")
        wait_until(lambda: ask(environment, *states).split() == ["idle"] * len(NODES), "slurmd")
        stack.callback(wait_until, lambda: not ask(environment, "squeue", "-h"), "the end of cancelled jobs")
        stack.callback(ask, environment, "scancel", f"--user={getpass.getuser()}")
        yield environment


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    """Return once the condition holds; exit if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.2)


def ask(environment: Mapping[str, str], *command: str) -> str:
    """What a command of Slurm prints; nothing if it fails."""
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stdout


def lose_a_node(out: Path, environment: Mapping[str, str]) -> None:
    """Once a network is half trained, take its node down and cancel the job of the other node."""
    wait_until(lambda: any(out.glob("*/checkpoints/teacher*")), "a checkpoint", 600)
    jobs = ask(environment, "squeue", "-h", "-r", "-t", "running", "-o", "%A %i %N").splitlines()
    if len(jobs) != len(NODES):
        sys.exit(f"expected a job on each node, got {jobs}")
    (job, name, node), (_, cancelled, _) = (line.split() for line in jobs)
    print(f"node {node} goes down with job {name}; job {cancelled} is cancelled", flush=True)
    ask(environment, "scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    ask(environment, "scancel", cancelled)

    def resumed() -> bool:
        words = ask(environment, "scontrol", "show", "job", job).split()
        facts = dict(word.partition("=")[::2] for word in words)
        return (facts.get("Restarts"), facts.get("JobState")) == ("1", "RUNNING") and facts.get("NodeList") != node

    wait_until(resumed, f"job {name} on another node")
    ask(environment, "scontrol", "update", f"NodeName={node}", "State=RESUME")
    print(f"job {name} resumes on another node", flush=True)


def contents(out: Path) -> dict[str, str]:
    """Hashes of the files of a sweep that are the same wherever it was made."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        hidden = any(part.startswith(".") for part in path.relative_to(out).parts)
        if path.is_file() and not hidden and path.suffix not in VARYING and path.name != "manifest.json":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def main() -> None:
    """Run the test; the last line says how it went."""
    if absent := [name for name in PROGRAMS if shutil.which(name) is None]:
        sys.exit(f"{', '.join(absent)} not found; on Debian: apt-get install slurm-wlm munge, then make cluster-test")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the daemons as well
    os.chdir(PROJECT_ROOT)
    with tempfile.TemporaryDirectory(prefix="smaf-cluster-") as name:
        folder = Path(name)
        cluster, local = folder / "cluster", folder / "local"
        (folder / "slurm").mkdir(mode=0o700)
        sweep = [sys.executable, "-m", "smaflib", *SWEEP, *(word for each in SETTINGS for word in ("--set", each))]
        with slurm(folder / "slurm") as environment:
            process = subprocess.Popen([*sweep, "--out", str(cluster), *CLUSTER], env=environment)
            try:
                lose_a_node(cluster, environment)
                if (status := process.wait(timeout=1800)) != 1:
                    sys.exit(f"the sweep that lost a job ended with status {status} instead of 1")
            finally:
                process.kill()
            subprocess.run([*sweep, "--out", str(cluster), *CLUSTER], env=environment, check=True, timeout=1800)
        subprocess.run([*sweep, "--out", str(local)], check=True, timeout=1800)
        made, expected = contents(cluster), contents(local)
        stages = [entry for path in cluster.glob("seed*") for entry in read_manifest(path)["stages"].values()]
    if different := sorted(key for key in made.keys() | expected.keys() if made.get(key) != expected.get(key)):
        sys.exit(f"differs from the local sweep: {', '.join(different[:10])}")
    reused = sum("reused_from" in entry for entry in stages)
    print(f"\n{len(made)} files of 4 runs equal those of the local sweep; {reused} of {len(stages)} stages were reused")


if __name__ == "__main__":
    main()
