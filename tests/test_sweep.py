"""Sweeps over seeds and settings: plans, tables worked out by hand, parts, clusters, refusals."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from smaflib import files
from smaflib.apps.cli import app
from smaflib.apps.sweep import parse_seeds, plan, run_jobs, write_tables
from smaflib.errors import ConfigError, RunError
from smaflib.runs import open_run, runner

VALUES = {("sum", 0): 0.60, ("sum", 1): 0.64, ("max", 0): 0.59, ("max", 1): 0.61}
GRID = {"attention.fusion": ["sum", "max"]}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text("data: {kind: mini, num_train: 2, num_val: 2}\n")
    return path


class FakeChain:
    """In place of the runner: opens the run and records an mIoU that depends on fusion rule and seed."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, list[str]]] = []
        self.failing = ""

    def __call__(
        self, config_file: Path, name: str, overrides: Sequence[str], until_stage: str, runs: Path, reuse: Sequence[str]
    ) -> None:
        self.calls.append((name, until_stage[:2], list(reuse)))
        run = open_run(runs / name, config_file, overrides)
        if name == self.failing:
            raise RunError("02_classifier failed\nand a traceback", exit_code=1)
        value = VALUES[run.config.attention.fusion, run.config.seed]
        run.record(
            "03_multi_scale_attention", [{"variant": "fused", "metric": "iou", "value": value, "split": "train"}]
        )


@pytest.fixture
def chain(monkeypatch: pytest.MonkeyPatch) -> FakeChain:
    fake = FakeChain()
    monkeypatch.setattr(runner, "run_notebooks", fake)
    return fake


def sweep(
    config: Path, out: Path, seeds: list[int], grid: dict[str, list[Any]], until: str | None = None, **how: Any
) -> list[str]:
    jobs = plan(seeds, grid, config, out, until=until)
    return run_jobs(jobs, lambda: write_tables(jobs, "mIoU"), **how)


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


# --- what is asked for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seeds"), [("3", [3]), ("0-4", [0, 1, 2, 3, 4]), ("0, 2,1", [0, 2, 1]), ("1-2,0,1", [1, 2, 0])]
)
def test_seeds(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds


def test_plan_is_seed_by_seed_with_names_that_are_folders(config: Path, tmp_path: Path) -> None:
    planned = plan([0, 1], GRID | {"attention.scales": [[0.5, 1.0]]}, config, tmp_path, ["num_threads=1"])
    assert [job.name for job in planned] == [
        "seed0-fusion-sum-scales-_0.5_1.0_",
        "seed0-fusion-max-scales-_0.5_1.0_",
        "seed1-fusion-sum-scales-_0.5_1.0_",
        "seed1-fusion-max-scales-_0.5_1.0_",
    ]
    assert planned[1].setting == "attention.fusion=max, attention.scales=[0.5, 1.0]"
    varied = ("seed=0", 'attention.fusion="max"', "attention.scales=[0.5, 1.0]")
    assert planned[1].overrides == ("num_threads=1", *varied)
    assert [job.name for job in plan([3], {}, config, tmp_path)] == ["seed3"]
    names = [job.name for job in plan([0], {"a.b": ["x/y", "x_y"]}, config, tmp_path)]
    assert len(set(names)) == 2 and all(name.startswith("seed0-b-x_y.") for name in names)


# --- runs and tables --------------------------------------------------------------------------------------------------


def test_tables_by_hand(chain: FakeChain, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    assert sweep(config, out, [0, 1], GRID) == []
    # A run reuses stages of the earlier runs of its seed.
    assert chain.calls == [
        ("seed0-fusion-sum", "08", []),
        ("seed0-fusion-max", "08", ["seed0-fusion-sum"]),
        ("seed1-fusion-sum", "08", []),
        ("seed1-fusion-max", "08", ["seed1-fusion-sum"]),
    ]
    (row,) = rows_of(out / "results.csv")
    assert row["attention.fusion=sum"] == "62.0 ± 2.8 (2)" and row["attention.fusion=max"] == "60.0 ± 1.4 (2)"
    assert row["row"] == "03 fused"
    (row,) = rows_of(out / "differences.csv")
    assert row["attention.fusion=max - attention.fusion=sum"] == "-2.0 ± 1.4 (2)"  # -1 and -3: paired
    markdown, latex = (out / "results.md").read_text(), (out / "results.tex").read_text()
    assert markdown.endswith("\n| --- | --- | --- |\n| 03 fused | 62.0 ± 2.8 (2) | 60.0 ± 1.4 (2) |\n")
    assert r"62.0 $\pm$ 2.8 (2) & 60.0 $\pm$ 1.4 (2) \\" in latex and "attention.fusion=sum" in latex


def test_failed_seed_is_named_and_the_others_run(chain: FakeChain, config: Path, tmp_path: Path) -> None:
    chain.failing, out = "seed0-fusion-max", tmp_path / "sweep"
    failures = sweep(config, out, [0, 1], GRID)
    assert failures == ["seed0-fusion-max: 02_classifier failed"] and len(chain.calls) == 4
    (row,) = rows_of(out / "results.csv")
    assert row["attention.fusion=max"] == "61.0"
    (row,) = rows_of(out / "differences.csv")
    assert row["attention.fusion=max - attention.fusion=sum"] == "-3.0"  # of the seed that both have
    chain.failing = ""
    sweep(config, out, [0, 1], GRID)
    (row,) = rows_of(out / "results.csv")
    assert row["attention.fusion=max"] == "60.0 ± 1.4 (2)"


def test_parts_share_the_seeds_and_the_tables(chain: FakeChain, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    with files.locked(out, "smaf sweep", ".lock-1-of-2"):  # the other part is running
        sweep(config, out, [0, 1], GRID, part="2/2")
    assert {name for name, *_ in chain.calls} == {"seed1-fusion-sum", "seed1-fusion-max"}
    sweep(config, out, [0, 1], GRID, part="1/2")
    (row,) = rows_of(out / "results.csv")
    assert row["attention.fusion=sum"] == "62.0 ± 2.8 (2)" and len(chain.calls) == 4
    assert sweep(config, out, [0, 1], GRID, part="3/3") == [] and len(chain.calls) == 4  # there is no third seed
    for wrong in ("", "3", "0/2", "3/2", "1/2/3"):
        with pytest.raises(ConfigError, match="--part must be I/N"):
            sweep(config, out, [0, 1], GRID, part=wrong)


# --- clusters ---------------------------------------------------------------------------------------------------------


def test_jobs_of_a_cluster_wait_for_what_they_share(chain: FakeChain, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    assert sweep(config, out, [0, 1], GRID, until="04", cluster="debug") == []
    assert [(name, until) for name, until, _ in chain.calls] == [
        ("seed0-fusion-sum", "02"),
        ("seed1-fusion-sum", "02"),
        ("seed0-fusion-sum", "04"),
        ("seed0-fusion-max", "04"),
        ("seed1-fusion-sum", "04"),
        ("seed1-fusion-max", "04"),
    ]
    assert chain.calls[3][2] == ["seed0-fusion-sum"]
    assert rows_of(out / "results.csv")[0]["attention.fusion=sum"] == "62.0 ± 2.8 (2)"


def test_processes_of_a_cluster_report_what_failed(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    with files.locked(out / "seed0", "smaf run"):
        (failure,) = sweep(config, out, [0], {}, cluster="local")
    log = Path(failure.partition("log: ")[2])
    assert failure.startswith("seed0: failed or cancelled") and "RunError: another smaf run" in log.read_text()


@pytest.mark.parametrize(("cluster", "options", "message"), [("slurm", [], "srun"), ("local", ["bogus=1"], "bogus")])
def test_cluster_that_is_not_available(
    cluster: str, options: list[str], message: str, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=rf"--cluster {cluster}: [\s\S]*{message}"):
        sweep(config, tmp_path / "sweep", [0], {}, cluster=cluster, options=options)


# --- the command ------------------------------------------------------------------------------------------------------


def test_command(chain: FakeChain, config: Path, tmp_path: Path) -> None:
    chain.failing = "seed1-fusion-sum"
    words = ["sweep", str(config), "--out", str(tmp_path / "out"), "--seeds", "0-1"]
    words += ["--grid", "attention.fusion=sum,max"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1 and "1 runs failed; the same command tries them again" in result.output
    assert "60.0" in result.output and "-1.0" in result.output
    chain.failing = ""
    assert CliRunner().invoke(app, words).exit_code == 0
    for wrong in (["--seeds", "x"], ["--part", "2"], ["--measure", "IoU"]):
        refused = CliRunner().invoke(app, [*words, *wrong])
        assert refused.exit_code == 2 and wrong[0] in refused.output


def test_compare_writes_the_formats_of_the_tables(chain: FakeChain, config: Path, tmp_path: Path) -> None:
    sweep(config, tmp_path / "out", [0], GRID)
    names = [str(tmp_path / "out" / name) for name in ("seed0-fusion-sum", "seed0-fusion-max")]
    outputs = {form: CliRunner().invoke(app, ["compare", *names, "--format", form]) for form in ("csv", "md", "tex")}
    assert "60.0,59.0,-1.0" in outputs["csv"].output and "| 60.0 | 59.0 | -1.0 |" in outputs["md"].output
    assert r"60.0 & 59.0 & -1.0 \\" in outputs["tex"].output
    assert CliRunner().invoke(app, ["compare", *names, "--format", "docx"]).exit_code == 2
