"""A sweep on a real Slurm of two nodes, on this machine: one node goes down, a job is cancelled.

    make cluster-test

Slurm requeues the job of the lost node, which resumes on the other node; the same command resumes what was cancelled.
Needs Debian's ``slurm-wlm`` and ``munge``. munged, slurmctld and two slurmd run from a temporary folder, on loopback
ports. Ends with status 1 if a file of the runs differs from that of a local sweep.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import platform
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from smaflib.files import PROJECT_ROOT, file_hash

NODES = ("one", "two")

# A requeued job waits until the credentials of its first start have expired: here 5 s, by default two minutes.
CONFIG = """ClusterName=smaftest
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmctldPort=16817
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdParameters=config_overrides
MinJobAge=3600
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
KillWait=15
NodeName=one NodeHostname={host} NodeAddr=127.0.0.1 Port=16818 CPUs=1 RealMemory=1000 State=UNKNOWN
NodeName=two NodeHostname={host} NodeAddr=127.0.0.1 Port=16819 CPUs=1 RealMemory=1000 State=UNKNOWN
PartitionName=tiny Nodes=ALL Default=YES MaxTime=30 State=UP
"""

# submitit asks sacct how jobs ended; without a data base for accounting, squeue knows it too.
SACCT = """#!/bin/sh
echo "JobID|State|NodeList"
exec squeue -h -r -t all -o "%i|%T|%N"
"""

SWEEP = "sweep configs/mini.yaml --seeds 0-1 --grid attention.fusion=sum,max --until 03".split()
SETTINGS = (
    "num_threads=1 data.num_train=8 data.num_val=4 data.image_size=64 classifier.iterations=40 "
    "classifier.checkpoint_minutes=0.001 classifier.crop_size=48 classifier.resize_range=[48,72]"
).split()
CLUSTER = "--cluster slurm --slurm partition=tiny --slurm time=20 --slurm mem=900M --slurm cpus_per_task=1".split()


@contextlib.contextmanager
def running(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """A process that is ended with the block."""
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=60)


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """A cluster of two nodes, both of them this machine, with a core each; yields the environment of its commands."""
    for name in ("bin", "state", *(f"spool/{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    key, sacct, config = folder / "munge.key", folder / "bin" / "sacct", folder / "slurm.conf"
    key.write_bytes(secrets.token_bytes(256))
    key.chmod(0o600)
    sacct.write_text(SACCT)
    sacct.chmod(0o755)
    host, user = platform.node().partition(".")[0], getpass.getuser()
    config.write_text(CONFIG.format(host=host, user=user, folder=folder))
    environment = os.environ | {"SLURM_CONF": str(config), "PATH": f"{sacct.parent}:{os.environ['PATH']}"}
    paths = [f"--{name}-file={folder / f'munge.{name}'}" for name in ("key", "pid", "log", "seed")]
    munged = ["munged", "--foreground", "--force", f"--socket={folder / 'munge.socket'}", *paths]
    with contextlib.ExitStack() as stack:
        stack.enter_context(running(munged, folder / "munged.log", environment))
        wait_until((folder / "munge.socket").exists, "munged")
        stack.enter_context(running(["slurmctld", "-D"], folder / "slurmctld.log", environment))
        for node in NODES:
            stack.enter_context(running(["slurmd", "-D", "-N", node], folder / f"{node}.log", environment))
        wait_until(lambda: ask(environment, "sinfo -h -N -o %T").split() == ["idle"] * len(NODES), "slurmd")
        stack.callback(wait_until, lambda: not ask(environment, "squeue -h"), "the end of cancelled jobs")
        stack.callback(ask, environment, f"scancel --user={user}")
        yield environment


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Return once the condition holds; exit if it does not within ten minutes."""
    deadline = time.monotonic() + 600
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"{what}: not within ten minutes")
        time.sleep(0.2)


def ask(environment: Mapping[str, str], command: str) -> str:
    """What a command of Slurm prints; nothing if it fails."""
    return subprocess.run(command.split(), env=environment, capture_output=True, text=True, timeout=60).stdout


def lose_a_node(out: Path, environment: Mapping[str, str]) -> None:
    """Once a network is half trained, take its node down and cancel the job of the other node."""
    wait_until(lambda: any(out.glob("*/checkpoints/teacher*")), "a checkpoint")
    jobs = ask(environment, "squeue -h -r -t running -o %i|%N").splitlines()
    (job, node), (cancelled, _) = (line.split("|") for line in jobs)
    print(f"node {node} goes down with job {job}; job {cancelled} is cancelled", flush=True)
    ask(environment, f"scontrol update NodeName={node} State=DOWN Reason=test")
    ask(environment, f"scancel {cancelled}")

    def resumed() -> bool:
        facts = ask(environment, f"scontrol show job {job}").split()
        return "Restarts=1" in facts and "JobState=RUNNING" in facts

    wait_until(resumed, f"job {job} on the other node")
    ask(environment, f"scontrol update NodeName={node} State=RESUME")
    print(f"job {job} resumes on the other node", flush=True)


def hashes(out: Path) -> dict[str, str]:
    """Hashes of the weights, arrays, pictures and metrics of a sweep's runs."""
    paths = [path for path in out.rglob("*") if path.suffix in (".safetensors", ".gz", ".png", ".csv", ".json")]
    return {str(path.relative_to(out)): file_hash(path) for path in paths if path.name != "manifest.json"}


def main() -> None:
    """Run the test; the last line says how it went."""
    os.chdir(PROJECT_ROOT)
    with tempfile.TemporaryDirectory(prefix="smaf-cluster-") as name:
        folder = Path(name)
        cluster, local = folder / "cluster", folder / "local"
        (folder / "slurm").mkdir(mode=0o700)
        sweep = [sys.executable, "-m", "smaflib", *SWEEP, *(word for each in SETTINGS for word in ("--set", each))]
        on_cluster = [*sweep, "--out", str(cluster), *CLUSTER]
        with slurm(folder / "slurm") as environment:
            process = subprocess.Popen(on_cluster, env=environment)
            try:
                lose_a_node(cluster, environment)
                if (status := process.wait(timeout=1800)) != 1:
                    sys.exit(f"the sweep that lost a job ended with status {status} instead of 1")
            finally:
                process.kill()
            subprocess.run(on_cluster, env=environment, check=True, timeout=1800)
        subprocess.run([*sweep, "--out", str(local)], check=True, timeout=1800)
        made, expected = hashes(cluster), hashes(local)
    if different := sorted(key for key in made.keys() | expected.keys() if made.get(key) != expected.get(key)):
        sys.exit(f"differs from the local sweep: {', '.join(different[:10])}")
    print(f"\n{len(made)} files of 4 runs equal those of the local sweep")


if __name__ == "__main__":
    main()
