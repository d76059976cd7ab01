"""A sweep as a workflow: which jobs there are, what each waits for, how Snakemake is called; a dry run of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from smaflib.apps import workflow
from smaflib.apps.cli import app
from smaflib.apps.sweep import plan, sweep
from smaflib.apps.workflow import (
    FIRST_READ,
    HEAVY,
    WORKFLOW,
    Combination,
    Job,
    check_workflow,
    first_open_stage,
    job_ends,
    plan_jobs,
    snakemake_arguments,
)
from smaflib.config import Config, flat_settings
from smaflib.errors import ConfigError, RunError
from smaflib.files import PROJECT_ROOT, SHIPPED
from smaflib.runs.inputs import code_hash
from smaflib.runs.shards import SHARDED
from smaflib.runs.stages import STAGES

FIRST, LAST = STAGES[0].name, STAGES[-1].name
has_snakemake = shutil.which("snakemake") is not None or find_spec("snakemake") is not None
needs_snakemake = pytest.mark.skipif(not has_snakemake, reason="the extra 'cluster' (Snakemake) is not installed")


def combinations(seeds: Sequence[int], grid: dict[str, list[object]]) -> list[Combination]:
    return [Combination(each.name, ("num_threads=1",), each.overrides) for each in plan(seeds, grid)]


def jobs_of(grid: dict[str, list[object]], last: str = LAST, shards: int = 1, seeds: Sequence[int] = (0,)) -> list[Job]:
    runs = combinations(seeds, grid)
    return plan_jobs(runs, last, [FIRST] * len(runs), shards)


# --- jobs -------------------------------------------------------------------------------------------------------------


def test_a_job_ends_with_a_stage_that_takes_long() -> None:
    assert job_ends(LAST) == [*HEAVY, LAST]
    assert job_ends("04_denoise_and_reactivate") == [*HEAVY[:2], "04_denoise_and_reactivate"]
    assert job_ends("01_data") == ["01_data"]


def test_jobs_of_one_run_come_one_after_the_other() -> None:
    jobs = jobs_of({}, last=HEAVY[1])
    assert jobs == [Job("seed0", HEAVY[0]), Job("seed0", HEAVY[1], needs=(f"seed0/{HEAVY[0]}",))]


def test_shards_stand_between_a_stage_and_the_one_before_it() -> None:
    jobs = {job.key: job for job in jobs_of({}, last=HEAVY[1], shards=2)}
    parts = [f"seed0/{HEAVY[1]}.{number}-of-2" for number in (1, 2)]
    assert {key: jobs[key].needs for key in parts} == dict.fromkeys(parts, (f"seed0/{HEAVY[0]}",))
    assert jobs[f"seed0/{HEAVY[1]}"].needs == tuple(parts) and jobs[parts[1]].part == "2/2"
    assert {job.stage for job in jobs_of({}, shards=2) if job.part} == set(SHARDED)


def test_what_settings_do_not_touch_is_made_once_and_taken_over() -> None:
    jobs = {job.key: job for job in jobs_of({"attention.fusion": ["sum", "max"]}, last=HEAVY[1], shards=2)}
    first, second = "seed0-fusion-sum", "seed0-fusion-max"
    assert jobs[f"{second}/{HEAVY[0]}"] == Job(second, HEAVY[0], needs=(f"{first}/{HEAVY[0]}",), reuse=(first,))
    assert jobs[f"{second}/{HEAVY[1]}"].reuse == ()  # the fusion makes a difference from here on
    shared = {job.key: job for job in jobs_of({"pseudo_masks.crf": ["mini", "voc"]}, shards=2)}
    taken = [job.stage for job in shared.values() if job.reuse]
    assert taken == list(HEAVY[:3]) and not [job for job in shared.values() if job.reuse and job.part]


def test_seeds_and_settings_of_training_share_nothing() -> None:
    jobs = jobs_of({"classifier.iterations": [10, 20]}, seeds=(0, 1))
    assert len(jobs) == 4 * 5 and not [job for job in jobs if job.reuse]
    assert all(need.startswith(f"{job.run}/") for job in jobs for need in job.needs)


def test_what_is_complete_is_no_job() -> None:
    runs = combinations((0,), {"attention.fusion": ["sum", "max"]})
    jobs = plan_jobs(runs, LAST, [None, "04_denoise_and_reactivate"], shards=1)
    assert [(job.run, job.stage) for job in jobs] == [(runs[1].name, stage) for stage in job_ends(LAST)[2:]]
    assert jobs[0].needs == ()
    (again,) = plan_jobs(runs, HEAVY[0], [None, FIRST], shards=1)
    assert (again.reuse, again.needs) == ((runs[0].name,), ())  # the other is there already


@given(st.data())
def test_every_job_waits_for_jobs_before_it(data: st.DataObject) -> None:
    settings = ["attention.fusion", "attention.scales", "self_training.rounds", "pseudo_masks.crf", "model.backbone"]
    grid = {name: ["a", "b"] for name in data.draw(st.lists(st.sampled_from(settings), unique=True, max_size=3))}
    runs = combinations(range(data.draw(st.integers(1, 3))), grid)
    names = [stage.name for stage in STAGES]
    last = data.draw(st.sampled_from(names))
    first_open = [data.draw(st.sampled_from([None, *names[: names.index(last) + 1]])) for _ in runs]
    jobs = plan_jobs(runs, last, first_open, data.draw(st.integers(1, 3)))
    seen: set[str] = set()
    for job in jobs:
        assert set(job.needs) <= seen and job.key not in seen
        seen.add(job.key)
    for run, begin in zip(runs, first_open, strict=True):
        assert (f"{run.name}/{last}" in seen) == (begin is not None)


def test_settings_that_first_make_a_difference_later_exist() -> None:
    names = set(flat_settings(Config.model_validate({"data": {"kind": "mini"}})))
    assert [name for name in FIRST_READ if not any(f"{known}.".startswith(f"{name}.") for known in names)] == []
    assert set(FIRST_READ.values()) | set(HEAVY) <= {stage.name for stage in STAGES}


# --- the call ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text("data: {kind: mini, num_train: 2, num_val: 2}\n")
    return path


def put_sacct(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A ``sacct`` of a cluster, in front of one that may be installed here."""
    folder.mkdir()
    (folder / "sacct").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "sacct").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would have been run; neither Snakemake nor Slurm need be there."""
    found: list[list[str]] = []
    put_sacct(tmp_path / "slurm", monkeypatch, "exit 0")
    monkeypatch.setattr(workflow.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(workflow, "find_spec", lambda name: None)
    monkeypatch.setattr(workflow, "_call", lambda command: found.append(list(command)))
    return found


def test_sweep_hands_its_plan_over(config: Path, tmp_path: Path, calls: list[list[str]]) -> None:
    out = tmp_path / "out"
    failures = sweep(config, out, [0], {"attention.fusion": ["sum"]}, ["num_threads=1"], profile="slurm", shards=3)
    profile = WORKFLOW / "profiles" / "slurm"
    assert calls == [["/bin/snakemake", *snakemake_arguments(profile, out)]]
    assert calls[0][1:7] == [
        "--snakefile",
        str(WORKFLOW / "Snakefile"),
        "--profile",
        str(profile),
        "--directory",
        str(out),
    ]
    assert "--nolock" in calls[0] and calls[0][-1] == f"plan={out}/.workflow/plan.json"
    planned = json.loads((out / ".workflow" / "plan.json").read_text())
    assert planned["settings"] == {
        "seed0-fusion-sum": """--set num_threads=1 --set seed=0 --set 'attention.fusion="sum"'"""
    }
    assert planned["code"] == code_hash(SHIPPED / "notebooks") and planned["runs"] == str(out)
    assert planned["smaf"] == f"{sys.executable} -m smaflib" and planned["config"] == str(config)
    assert len(planned["jobs"]) == 5 + 2 * 3
    # Nothing was run, so nothing is complete.
    assert failures == [f"seed0-fusion-sum: not complete; logs: {out}/.workflow/logs/seed0-fusion-sum"]
    assert (out / "runs.tsv").is_file() and "nothing is measured" in (out / "results.txt").read_text()


def test_profile_may_be_a_folder_of_ones_own(config: Path, tmp_path: Path, calls: list[list[str]]) -> None:
    shutil.copytree(WORKFLOW / "profiles" / "local", tmp_path / "mine")
    words = ["sweep", str(config), "--out", str(tmp_path / "out"), "--seeds", "0", "--profile", str(tmp_path / "mine")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1 and "1 runs failed; the same command tries them again" in result.output
    assert str(tmp_path / "mine") in calls[0]


def test_what_earlier_calls_left_of_snakemake_is_thrown_away(
    config: Path, tmp_path: Path, calls: list[list[str]]
) -> None:
    old = tmp_path / "out" / ".workflow" / "done" / "seed0" / HEAVY[0]
    old.parent.mkdir(parents=True)
    old.touch()
    sweep(config, tmp_path / "out", [0], {}, profile="local")
    assert not old.exists() and len(calls) == 1


def test_nothing_is_called_where_nothing_is_to_do(
    config: Path, tmp_path: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workflow, "first_open_stage", lambda *_: None)
    monkeypatch.setattr("smaflib.apps.sweep.first_open_stage", lambda *_: None)
    assert sweep(config, tmp_path / "out", [0, 1], {}, profile="slurm") == [] and calls == []


def test_run_that_has_not_begun_is_open_from_the_first_stage(config: Path, tmp_path: Path) -> None:
    assert first_open_stage(tmp_path / "nowhere", config, [], LAST) == FIRST
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profile": "slurm", "shards": 0}, r"--shards must be from 1 \(no shards\) to 10,000, got 0"),
        ({"profile": "slrum"}, r"--profile must be one of local and slurm .*got 'slrum'"),
        ({"profile": ""}, "--profile must be one of"),
        ({"shards": 2}, "--shards needs --profile"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    config: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep(config, tmp_path / "out", [0], {}, **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_missing_snakemake_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workflow, "find_spec", lambda name: None)
    monkeypatch.setattr(workflow.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'smaflib\[cluster\]'"):
        check_workflow("local", 1)


@pytest.mark.parametrize(
    ("sacct", "message"),
    [
        (
            "echo accounting is disabled >&2; exit 1",
            r"does not work here \(accounting is disabled\).*status-command: squeue",
        ),
        ("sleep 9", "sacct does not answer within 1 s"),
        ("exit 0", None),
    ],
)
def test_slurm_that_does_not_tell_how_jobs_end_is_refused(
    tmp_path: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch, sacct: str, message: str | None
) -> None:
    put_sacct(tmp_path / "other", monkeypatch, sacct)
    monkeypatch.setattr(workflow, "SACCT_SECONDS", 1.0)
    if message is None:
        assert check_workflow("slurm", 1)[0] == ["/bin/snakemake"]
    else:
        with pytest.raises(ConfigError, match=message):
            check_workflow("slurm", 1)
    assert check_workflow("local", 1)[0] == ["/bin/snakemake"]


def test_profile_that_is_no_yaml(tmp_path: Path, calls: list[list[str]]) -> None:
    (tmp_path / "config.yaml").write_text("executor: [slurm")
    with pytest.raises(ConfigError, match=r"config\.yaml is not valid YAML"):
        check_workflow(str(tmp_path), 1)


def test_end_that_no_job_explains_is_an_error() -> None:
    workflow._call([sys.executable, "-c", "raise SystemExit(1)"])  # jobs failed: the manifests say which
    with pytest.raises(RunError, match="Snakemake ended with status 3; the same command goes on"):
        workflow._call([sys.executable, "-c", "raise SystemExit(3)"])


def signal_once_there(path: Path, number: signal.Signals, then: Path) -> threading.Thread:
    """Send this process a signal once a file is there, then make another one."""

    def act() -> None:
        while not path.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)
        then.touch()

    thread = threading.Thread(target=act)
    thread.start()
    return thread


def test_sigterm_reaches_snakemake_as_an_interruption(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    script = f"""
import pathlib, time
try:
    pathlib.Path({str(ready)!r}).touch()
    time.sleep(60)
except KeyboardInterrupt:
    raise SystemExit(7)
"""
    thread = signal_once_there(ready, signal.SIGTERM, tmp_path / "sent")
    with pytest.raises(RunError, match="status 7"):
        workflow._call([sys.executable, "-c", script])
    thread.join()


def test_interruption_is_snakemakes_own_to_answer(tmp_path: Path) -> None:
    """A terminal has sent it to both; this process waits until the other one has ended."""
    ready, sent, done = (tmp_path / name for name in ("ready", "sent", "done"))
    script = f"""
import pathlib, time
pathlib.Path({str(ready)!r}).touch()
while not pathlib.Path({str(sent)!r}).exists():
    time.sleep(0.01)
pathlib.Path({str(done)!r}).touch()
raise SystemExit(1)
"""
    thread = signal_once_there(ready, signal.SIGINT, sent)
    workflow._call([sys.executable, "-c", script])
    thread.join()
    assert done.exists()
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


# --- the Snakefile and its profiles -----------------------------------------------------------------------------------


def test_profiles_give_every_rule_what_it_needs() -> None:
    rules = {
        line.split()[1].rstrip(":") for line in (WORKFLOW / "Snakefile").read_text().splitlines() if line[:5] == "rule "
    }
    rules |= {line.split()[4] for line in (WORKFLOW / "Snakefile").read_text().splitlines() if line[:9] == "use rule "}
    slurm = yaml.safe_load((WORKFLOW / "profiles" / "slurm" / "config.yaml").read_text())
    assert slurm["set-resources"].keys() == slurm["set-threads"].keys() == rules - {"all"}
    assert slurm["default-resources"]["tasks_per_gpu"] == 0  # one task starts the processes of all GPUs
    local = yaml.safe_load((WORKFLOW / "profiles" / "local" / "config.yaml").read_text())
    for profile in (slurm, local):
        assert profile["rerun-incomplete"] and profile["keep-going"] and profile["rerun-triggers"] == "mtime"


@needs_snakemake
@pytest.mark.parametrize("last", [HEAVY[1], "04_denoise_and_reactivate", "07_segmentation", LAST])
def test_dry_run_has_every_job(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str) -> None:
    outputs: list[str] = []

    def dry_run(command: Sequence[str]) -> None:
        done = subprocess.run([*command, "--dry-run"], cwd=PROJECT_ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout + done.stderr)

    monkeypatch.setattr(workflow, "_call", dry_run)
    out, grid = tmp_path / "out", {"attention.fusion": ["sum", "max"]}
    sweep(config, out, [0, 1], grid, ["num_threads=1"], until_stage=last, profile="local", shards=2)
    jobs = json.loads((out / ".workflow" / "plan.json").read_text())["jobs"]
    shell = [line for line in outputs[0].splitlines() if " -m smaflib " in line]
    assert len(shell) == len(jobs)
    assert sum(" shard " in line for line in shell) == sum(bool(job["part"]) for job in jobs.values()) > 0
    assert sum(" --reuse seed" in line for line in shell) == 2  # the classifier of each seed
    assert all(" --code " in line for line in shell)


@needs_snakemake
def test_node_with_other_code_makes_nothing_and_its_job_fails(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workflow, "code_hash", lambda notebooks: "0" * 64)  # planned with another version
    failures = sweep(config, tmp_path / "out", [0, 1], {}, until_stage="01", profile="local")
    assert [failure.split(":")[0] for failure in failures] == ["seed0", "seed1"]  # the other is tried all the same
    logs = [(tmp_path / "out" / ".workflow" / "logs" / f"seed{n}" / "01_data.log").read_text() for n in (0, 1)]
    assert all("planned with (--code 000000000000" in log and "Nothing was run" in log for log in logs)
    assert "install the same version on every node" in capfd.readouterr().err  # the log of what failed is shown
    assert not (tmp_path / "out" / "seed0").exists()
