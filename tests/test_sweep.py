"""A sweep over seeds and settings: what it plans, its tables worked out by hand, what it refuses."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from smaflib.apps import sweep as sweeps
from smaflib.apps.cli import app
from smaflib.apps.sweep import parse_grid, parse_seeds, plan, sweep
from smaflib.errors import ConfigError, InputError, StageFailed
from smaflib.runs import open_run

VALUES = {("sum", 0): 0.60, ("sum", 1): 0.64, ("max", 0): 0.59, ("max", 1): 0.61}
GRID = {"attention.fusion": ["sum", "max"]}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text("data: {kind: mini, num_train: 2, num_val: 2}\n")
    return path


class FakeChain:
    """Stands for the runner: opens the run, records an mIoU that depends on fusion and seed."""

    def __init__(self, failing: str = "") -> None:
        self.calls: list[tuple[str, list[str]]] = []
        self.failing = failing

    def __call__(
        self,
        config_file: Path,
        name: str,
        overrides: Sequence[str],
        until_stage: str,
        runs: Path,
        reuse: Sequence[str],
    ) -> None:
        self.calls.append((name, list(reuse)))
        run = open_run(runs / name, config_file, overrides)
        if name == self.failing:
            raise StageFailed("02_classifier failed\nand a traceback")
        value = VALUES[run.config.attention.fusion, run.config.seed]
        run.record(
            "03_multi_scale_attention", [{"variant": "fused", "metric": "iou", "value": value, "split": "train"}]
        )


@pytest.mark.parametrize(
    ("text", "seeds"), [("3", [3]), ("0-4", [0, 1, 2, 3, 4]), ("0, 2,1", [0, 2, 1]), ("1-2,0,1", [1, 2, 0])]
)
def test_seeds(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "1-", "4-1", "-1", "1.5", "0-99999999", "1,,2", "9" * 5000])
def test_seeds_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--seeds must be numbers such as 0,1,2 or a range"):
        parse_seeds(text)


@given(st.text(max_size=30))
def test_any_text_is_seeds_or_an_error(text: str) -> None:
    try:
        seeds = parse_seeds(text)
    except ConfigError:
        return
    assert seeds and len(set(seeds)) == len(seeds)


def test_grid() -> None:
    texts = ["attention.fusion=sum,max", "attention.scales=[0.5, 1],[1]", "crf=null"]
    assert parse_grid(texts) == {
        "attention.fusion": ["sum", "max"],
        "attention.scales": [[0.5, 1], [1]],
        "crf": [None],
    }


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["attention.fusion"], "must be a setting and its values"),
        (["=1,2"], "must be a setting and its values"),
        (["a="], "must be a setting and its values"),
        (["a=[1"], "must be a setting and its values"),
        (["a=1", "a=2"], "gives 'a' a second time; put all its values"),
        (["seed=1,2"], "gives 'seed' a second time; --seeds sets it"),
    ],
)
def test_grid_that_is_none(texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_grid(texts)


def test_plan_is_seed_by_seed_with_names_that_are_folders() -> None:
    planned = plan([0, 1], GRID | {"attention.scales": [[0.5, 1.0]]})
    assert [each.name for each in planned] == [
        "seed0-fusion-sum-scales-_0.5_1.0_",
        "seed0-fusion-max-scales-_0.5_1.0_",
        "seed1-fusion-sum-scales-_0.5_1.0_",
        "seed1-fusion-max-scales-_0.5_1.0_",
    ]
    assert planned[1].setting == "attention.fusion=max, attention.scales=[0.5, 1.0]"
    assert planned[1].overrides == ("seed=0", 'attention.fusion="max"', "attention.scales=[0.5, 1.0]")
    assert [each.name for each in plan([3], {})] == ["seed3"]


def test_settings_that_would_share_a_folder_get_numbers() -> None:
    names = [each.name for each in plan([0], {"a.b": ["x/y", "x_y"]})]
    assert len(set(names)) == 2 and all(name.startswith("seed0-b-x_y.") for name in names)
    with pytest.raises(ConfigError, match=r"2 seeds by 600 settings are more than 1,000 runs"):
        plan([0, 1], {"a": list(range(600))})


def test_tables_by_hand(config: Path, tmp_path: Path) -> None:
    chain, out = FakeChain(), tmp_path / "sweep"
    assert sweep(config, out, [0, 1], GRID, run_one=chain) == []
    # A run may take over stages of the runs of its seed that are there.
    assert chain.calls == [
        ("seed0-fusion-sum", []),
        ("seed0-fusion-max", ["seed0-fusion-sum"]),
        ("seed1-fusion-sum", []),
        ("seed1-fusion-max", ["seed1-fusion-sum"]),
    ]
    (row,) = csv.DictReader((out / "results.csv").read_text().splitlines())
    assert row["attention.fusion=sum"] == "62.0 ± 2.8 (2)" and row["attention.fusion=max"] == "60.0 ± 1.4 (2)"
    assert row["row"] == "03 fused, train"
    (row,) = csv.DictReader((out / "differences.csv").read_text().splitlines())
    assert row["attention.fusion=max - attention.fusion=sum"] == "-2.0 ± 1.4 (2)"  # -1 and -3: paired
    assert "| 62.0 ± 2.8 (2) | 60.0 ± 1.4 (2) |" in (out / "results.md").read_text()
    assert r"62.0 $\pm$ 2.8 (2) & 60.0 $\pm$ 1.4 (2) \\" in (out / "results.tex").read_text()
    assert r"attention.fusion=sum" in (out / "results.tex").read_text()
    runs = list(csv.DictReader((out / "runs.tsv").read_text().splitlines(), delimiter="\t"))
    assert [(run["run"], run["seed"]) for run in runs][1] == ("seed0-fusion-max", "0")


def test_only_the_run_that_has_changed_is_read_again(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    read_run = sweeps.read_run
    monkeypatch.setattr(sweeps, "read_run", lambda folder: (read.append(folder.name), read_run(folder))[1])
    names = ["seed0-fusion-sum", "seed0-fusion-max", "seed1-fusion-sum", "seed1-fusion-max"]
    sweep(config, tmp_path / "sweep", [0, 1], GRID, run_one=FakeChain())
    assert read == names
    sweep(config, tmp_path / "sweep", [0, 1], GRID, run_one=lambda *_, **__: None)  # nothing is new
    assert read == names
    monkeypatch.setitem(VALUES, ("max", 1), 0.81)
    sweep(config, tmp_path / "sweep", [0, 1], GRID, run_one=FakeChain())
    assert read == names * 2  # each has written its records anew
    (row,) = csv.DictReader((tmp_path / "sweep" / "results.csv").read_text().splitlines())
    assert row["attention.fusion=max"] == "70.0 ± 15.6 (2)"


def test_one_seed_without_a_grid_has_no_spread(config: Path, tmp_path: Path) -> None:
    sweep(config, tmp_path / "sweep", [0], {}, ["attention.fusion=sum"], run_one=FakeChain())
    (row,) = csv.DictReader((tmp_path / "sweep" / "results.csv").read_text().splitlines())
    assert row["value"] == "60.0"
    assert (tmp_path / "sweep" / "differences.md").read_text() == "nothing is measured yet\n"


def test_seed_that_failed_is_named_and_the_others_are_made(config: Path, tmp_path: Path) -> None:
    chain = FakeChain(failing="seed0-fusion-max")
    failures = sweep(config, tmp_path / "sweep", [0, 1], GRID, run_one=chain)
    assert failures == ["seed0-fusion-max: 02_classifier failed"] and len(chain.calls) == 4
    (row,) = csv.DictReader((tmp_path / "sweep" / "results.csv").read_text().splitlines())
    assert row["attention.fusion=max"] == "61.0"
    (row,) = csv.DictReader((tmp_path / "sweep" / "differences.csv").read_text().splitlines())
    assert row["attention.fusion=max - attention.fusion=sum"] == "-3.0"  # of the seed that both have
    sweep(config, tmp_path / "sweep", [0, 1], GRID, run_one=FakeChain())  # the same call tries again
    (row,) = csv.DictReader((tmp_path / "sweep" / "results.csv").read_text().splitlines())
    assert row["attention.fusion=max"] == "60.0 ± 1.4 (2)"


@pytest.mark.parametrize("grid", [{"attention.fusion": ["sum", "mode"]}, {"attention.bogus": [1]}])
def test_settings_that_do_not_fit_are_refused_before_anything_runs(
    config: Path, tmp_path: Path, grid: dict[str, Any]
) -> None:
    chain = FakeChain()
    with pytest.raises(ConfigError, match=next(iter(grid)).partition(".")[2]):
        sweep(config, tmp_path / "sweep", [0, 1], grid, run_one=chain)
    assert not chain.calls and not (tmp_path / "sweep").exists()


def test_measure_that_is_none(config: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the measure must be one of mIoU, small"):
        sweep(config, tmp_path / "sweep", [0], {}, measure="IoU", run_one=FakeChain())


def test_command(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = FakeChain(failing="seed1-fusion-sum")
    monkeypatch.setattr("smaflib.runs.runner.run_notebooks", chain)
    words = [
        "sweep",
        str(config),
        "--out",
        str(tmp_path / "out"),
        "--seeds",
        "0-1",
        "--grid",
        "attention.fusion=sum,max",
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1 and "1 runs failed; the same command tries them again" in result.output
    assert "60.0" in result.output and "-1.0" in result.output
    chain.failing = ""
    assert CliRunner().invoke(app, words).exit_code == 0
    refused = CliRunner().invoke(app, [*words, "--seeds", "x"])
    assert refused.exit_code == 2 and "--seeds must be numbers" in refused.output


def test_compare_writes_the_formats_of_the_tables(config: Path, tmp_path: Path) -> None:
    sweep(config, tmp_path / "out", [0], GRID, run_one=FakeChain())
    names = [str(tmp_path / "out" / name) for name in ("seed0-fusion-sum", "seed0-fusion-max")]
    outputs = {form: CliRunner().invoke(app, ["compare", *names, "--format", form]) for form in ("csv", "md", "tex")}
    assert "60.0,59.0,-1.0" in outputs["csv"].output and "| 60.0 | 59.0 | -1.0 |" in outputs["md"].output
    assert r"60.0 & 59.0 & -1.0 \\" in outputs["tex"].output
    assert CliRunner().invoke(app, ["compare", *names, "--format", "docx"]).exit_code == 2
