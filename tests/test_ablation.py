"""The ablation: which run measures which row, what the result holds, its table worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from smaflib.apps.ablation import FULL, RUNS, ablate, ablation_table, command, read_ablation
from smaflib.config import Variant
from smaflib.runs import Run, open_run, runner
from smaflib.runs.manifest import write_manifest
from smaflib.runs.stages import ABLATION

STUDENTS = {"full": 0.6, "single-scale": 0.55, "undenoised": 0.5, "unreactivated": 0.45}
"""mIoU of the pseudo masks, by the end of a run's name."""


class FakeChain:
    """In place of the runner: records what notebooks 03 to 06 of each run record."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[bool, ...], list[str]]] = []

    def __call__(
        self, config_file: Path, name: str, overrides: Sequence[str], until_stage: str, runs: Path, reuse: Sequence[str]
    ) -> None:
        run = open_run(runs / name, config_file, overrides)
        settings, seed = run.config.self_training, run.config.seed
        self.calls.append((name, (settings.fused, settings.denoise, settings.reactivate), list(reuse)))
        assert until_stage == "06_pseudo_masks"
        value = STUDENTS[name.partition("-")[2]] + seed / 100
        fusion = {"fusion": run.config.attention.fusion}
        measured = [
            ("03", Variant.TEACHER_FUSED, 0.41, fusion),
            ("03", Variant.TEACHER_FUSED, 0.99, {"fusion": "mean"}),  # another rule than the run's
            ("04", Variant.TEACHER_FUSED, 0.98, fusion),  # not at the oracle threshold
            ("05", Variant.STUDENT, value - 0.11, {"scale": 1.0}),
            ("05", Variant.STUDENT_FUSED, value - 0.1, fusion),
            ("06", Variant.UNREFINED_MASKS, value - 0.12, {}),
            ("06", Variant.PSEUDO_MASKS, value, {}),
            ("06", Variant.TEACHER_FUSED_REFINED, 0.42, {}),
            ("06", Variant.STUDENT_REFINED, value - 0.02, {}),
        ]
        for stage in ("03", "04", "05", "06"):
            records = [
                {"variant": variant, "metric": "iou", "value": iou, "bg_score": 0.3, "object_size": size} | more
                for number, variant, iou, more in measured
                for size in ("all", "small", "medium", "large")
                if number == stage
            ]
            run.record(stage, records)
        write_manifest(run.folder, {"stages": {"06_pseudo_masks": {"status": "complete"}}, "git_commit": "abc"})


@pytest.fixture
def chain(monkeypatch: pytest.MonkeyPatch) -> FakeChain:
    fake = FakeChain()
    monkeypatch.setattr(runner, "run_notebooks", fake)
    return fake


@pytest.fixture
def run(tmp_path: Path) -> Run:
    config = tmp_path / "tiny.yaml"
    config.write_text("data: {kind: mini, num_train: 2, num_val: 2}\nself_training: {control: true}\n")
    return open_run(tmp_path / "runs" / "tiny", config, ["num_threads=1"])


def records_of(run: Run) -> list[dict[str, Any]]:
    result = read_ablation(run)
    assert result is not None
    return result["records"]


def test_runs_differ_in_one_setting_and_share_their_stages(chain: FakeChain, run: Run) -> None:
    assert ablate(run, [0, 1]) == []
    names = [f"seed{seed}-{name}" for seed in (0, 1) for name in RUNS]
    assert [name for name, *_ in chain.calls] == names
    off = [(True, True, True), (False, True, True), (True, False, True), (True, True, False)]
    assert [settings for _, settings, _ in chain.calls] == off * 2
    assert [reuse for *_, reuse in chain.calls][:2] == [[str(run.folder)], ["seed0-full", str(run.folder)]]


def test_rows_are_read_from_the_records_of_the_notebooks(chain: FakeChain, run: Run) -> None:
    ablate(run, [1])
    records = records_of(run)
    rows = {(r["variant"], r["bg_choice"], r["object_size"]) for r in records}
    assert len(records) == len(rows) == 15 * 4 and {r["seed"] for r in records} == {1}
    value = {(r["variant"], r["bg_choice"]): round(r["value"], 2) for r in records if r["object_size"] == "all"}
    assert value == {
        ("full", "own"): 0.61,
        ("full", "oracle"): 0.51,
        ("one_pass", "own"): 0.59,
        ("one_pass", "oracle"): 0.5,
        ("no_fusion", "own"): 0.54,
        ("no_fusion", "oracle"): 0.45,
        ("no_denoising", "own"): 0.51,
        ("no_denoising", "oracle"): 0.41,
        ("no_reactivation", "own"): 0.46,
        ("no_reactivation", "oracle"): 0.36,
        ("no_self_training", "own"): 0.42,
        ("no_self_training", "oracle"): 0.41,
        ("no_crf", "own"): 0.49,
        ("control", "own"): 0.56,
        ("control", "oracle"): 0.46,
    }


def test_result_says_where_it_comes_from_and_stays_if_nothing_is_new(chain: FakeChain, run: Run) -> None:
    ablate(run, [0])
    result, before = read_ablation(run), run.path(ABLATION).stat().st_mtime_ns
    assert result is not None and result["seeds"] == [0] and result["settings"]["data"]["num_train"] == 2
    assert result["git_commit"] == "abc" and set(result) >= {"finished", "packages", "device", "variants"}
    assert result["command"] == command(run, [0]) and result["command"].endswith("--seeds 0")
    assert " ablate " in result["command"] and "--set num_threads=1" in result["command"]
    ablate(run, [0])
    assert run.path(ABLATION).stat().st_mtime_ns == before  # so notebook 08 does not run again


def by_hand(*values: tuple[str, int, float]) -> list[dict[str, Any]]:
    return [
        {"variant": name, "seed": seed, "bg_choice": choice, "object_size": size, "value": value + more}
        for name, seed, value in values
        for choice, more in (("own", 0.0), ("oracle", 0.1))
        for size in ("all", "small", "medium", "large")
    ]


def test_table_by_hand() -> None:
    records = by_hand((FULL, 0, 0.5), (FULL, 1, 0.7), ("no_crf", 0, 0.4), ("no_crf", 1, 0.5))
    records = [r | {"value": None} if r["object_size"] == "small" else r for r in records]
    records = [r for r in records if (r["variant"], r["bg_choice"]) != ("no_crf", "oracle")]
    table = ablation_table(records)
    assert table.index.tolist() == ["the whole chain", "without CRF"]
    of_full, large = table.loc["the whole chain"], "60.0 ± 14.1"
    assert of_full.tolist() == ["60.0 ± 14.1", "–", large, large, "–", "70.0 ± 14.1", "–"]
    assert table.columns.tolist()[-3:] == ["to full", "mIoU, oracle", "to full, oracle"]
    # -10 and -20: by seed, not of the means.
    assert table.loc["without CRF"].tolist() == ["45.0 ± 7.1", "–", "45.0 ± 7.1", "45.0 ± 7.1", "-15.0 ± 7.1", "–", "–"]
    one_seed = ablation_table(by_hand((FULL, 0, 0.5), ("no_crf", 0, 0.4)))
    assert one_seed.loc["without CRF", "to full"] == "-10.0"
    assert ablation_table(by_hand((FULL, 0, 0.5))).loc["the whole chain", "to full"] == "–"
