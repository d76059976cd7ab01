"""The ablation: what each variant leaves out, resuming after a crash, and reading the result."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from smaflib.apps import ablation
from smaflib.apps.ablation import (
    FULL,
    LABELS,
    RESULT,
    ROWS,
    STUDENTS,
    SeedWorkspace,
    ablate,
    ablate_seed,
    ablation_table,
    command,
    read_ablation,
    score_row,
)
from smaflib.apps.cli import app
from smaflib.data.masks import ground_truth_of
from smaflib.data.sample import Samples
from smaflib.errors import ConfigError, DataError, RunError
from smaflib.evaluation import evaluate, masks_of
from smaflib.files import PROJECT_ROOT, locked
from smaflib.maps import FusedMaps
from smaflib.pipeline import train_student
from smaflib.report.plots import plot_ablation
from smaflib.runs import Run, open_run
from smaflib.runs.inputs import stage_inputs
from smaflib.runs.manifest import write_manifest
from smaflib.runs.stages import stage_named

matplotlib.use("agg")

TINY = (
    "num_threads=1",
    "data.num_train=7",
    "data.num_val=1",
    "data.image_size=64",
    "classifier.iterations=3",
    "classifier.crop_size=48",
    "classifier.resize_range=[48, 60]",
    "self_training.iterations=3",
    "self_training.crop_size=48",
    "self_training.resize_range=[48, 60]",
    "attention.scales=[0.5, 1.0]",
    "pseudo_masks.crf.iterations=1",
    "evaluation.thresholds=[0.2, 0.4, 0.6]",
)


def tiny_run(folder: Path, *more: str) -> Run:
    return open_run(folder, PROJECT_ROOT / "configs" / "mini.yaml", [*TINY, *more])


def work_of(run: Run) -> SeedWorkspace:
    folder = run.path("ablation", "seed0")
    return SeedWorkspace(folder, run.config)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An ablation of seed 0, complete."""
    run = tiny_run(tmp_path_factory.mktemp("runs") / "tiny")
    ablate(run, [0])
    return run


@pytest.fixture
def copy(done: Run, tmp_path: Path) -> Run:
    """A copy of it that a test may change."""
    shutil.copytree(done.folder, tmp_path / "copy")
    return dataclasses.replace(done, folder=tmp_path / "copy")


def records_of(run: Run) -> list[dict[str, Any]]:
    result = read_ablation(run)
    assert result is not None
    return result["records"]


# --- the variants -----------------------------------------------------------------------------------------------------


def test_every_variant_is_scored_at_both_scores_for_all_sizes(done: Run) -> None:
    records = records_of(done)
    rows = {(r["variant"], r["bg_choice"], r["object_size"]) for r in records}
    assert len(records) == len(rows) == len(ROWS) * 2 * 4
    assert {r["seed"] for r in records} == {0}
    assert all(0 <= r["value"] <= 1 for r in records if r["value"] is not None)
    assert {r["bg_score"] for r in records if r["bg_choice"] == "own"} == {done.config.attention.bg_score}


def test_oracle_threshold_is_never_worse_than_the_runs_own_score(done: Run) -> None:
    of_all = {(r["variant"], r["bg_choice"]): r["value"] for r in records_of(done) if r["object_size"] == "all"}
    assert all(of_all[name, "oracle"] >= of_all[name, "own"] for name in ROWS)


def taught(run: Run, name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Sequence[Tensor], Any]:
    """The maps and settings that a student is trained with."""
    given: list[Any] = []

    def note(teacher: Any, samples: Any, denoised: Any, settings: Any, *_: Any, **options: Any) -> Any:
        given.extend([denoised, settings])
        return teacher, []

    monkeypatch.setattr("smaflib.self_training.self_train", note)
    work = work_of(run)
    work.checkpoint(name).unlink()  # a finished student is given no targets
    train_student(work, name, **STUDENTS[name])
    return given[0], given[1]


def test_without_denoising_the_targets_hold_absent_classes(copy: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    denoised, settings = taught(copy, "student_undenoised", monkeypatch)
    work = work_of(copy)
    fused = work.maps("teacher").fused(work.samples().image_ids[0], copy.config.attention.fusion)
    absent = work.samples().image_labels[0] == 0
    assert torch.allclose(denoised[0], fused, atol=1e-3)  # kept in half precision
    assert (denoised[0][absent].amax(dim=(1, 2)) > 0.99).all()  # each of them peaks at 1
    assert settings.reactivate


def test_without_reactivation_the_targets_are_the_scores_as_they_are(
    copy: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoised, settings = taught(copy, "student_unreactivated", monkeypatch)
    expected, _ = taught(copy, "student", monkeypatch)
    assert torch.equal(denoised[0], expected[0])
    assert not settings.reactivate


def test_the_controls_targets_come_from_one_scale(copy: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    denoised, settings = taught(copy, "student_control", monkeypatch)
    work = work_of(copy)
    expected = work.denoised("teacher", work.samples(), [1.0])
    assert torch.allclose(denoised[0], expected[0], atol=1e-3)
    assert settings.reactivate


def test_without_crf_is_the_full_variant_before_the_crf(done: Run) -> None:
    work = work_of(done)
    samples = work.samples()
    masks = masks_of(work.denoised("student", samples), work.bg_score)
    ground_truth = ground_truth_of(samples)
    assert ground_truth is not None
    expected = evaluate(masks, ground_truth, samples.class_names, done.config.evaluation)
    (value,) = [
        r["value"]
        for r in records_of(done)
        if r["variant"] == "no_crf" and r["bg_choice"] == "own" and r["object_size"] == "all"
    ]
    assert value == expected.miou


def test_rows_differ_in_what_they_name() -> None:
    full = ROWS[FULL]
    assert dataclasses.replace(ROWS["no_crf"], label=full.label, how=full.how, refined=True) == full
    assert ROWS["no_self_training"].network == "teacher"
    assert not ROWS["no_fusion"].fused and ROWS["control"].fused
    assert {row.network for row in ROWS.values()} == {"teacher", *STUDENTS}


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_killed_ablation_goes_on_and_ends_with_the_same_numbers(
    done: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tmp_path / "killed")

    def train_and_die(work: SeedWorkspace, name: str, **changes: bool) -> None:
        if name == "student_undenoised":
            raise KeyboardInterrupt
        train_student(work, name, **changes)

    monkeypatch.setattr(ablation, "train_student", train_and_die)
    with pytest.raises(KeyboardInterrupt):
        ablate(run, [0])
    assert not run.path(RESULT).exists()
    kept = {path: path.stat().st_mtime_ns for path in run.path("ablation/seed0/cams").rglob("*.npz")}
    assert len(kept) == 3 * 7  # teacher, student, control

    monkeypatch.setattr(ablation, "train_student", train_student)
    ablate(run, [0])
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert records_of(run) == records_of(done)


def test_complete_seeds_are_not_scored_again(copy: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = copy.path(RESULT).read_bytes()
    monkeypatch.setattr(ablation, "score_row", lambda *_: pytest.fail("scored again"))
    ablate(copy, [0])
    assert copy.path(RESULT).read_bytes() == before  # and so notebook 08 does not run again


def test_scores_of_another_network_are_not_used(copy: Run) -> None:
    path = copy.path("ablation/seed0/scores/full.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"network": "another", "records": []}))
    ablate(copy, [0])
    assert len(records_of(copy)) == len(ROWS) * 8


def test_networks_of_a_complete_run_are_taken_over(done: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run(tmp_path / "finished")
    shutil.copytree(done.path("ablation/seed0"), run.folder, dirs_exist_ok=True)
    names = ("01_data", "02_classifier", "03_multi_scale_attention", "05_self_training")
    write_manifest(run.folder, {"stages": {name: {"status": "complete"} for name in names}})
    ablate(run, [0])
    work = work_of(run)
    for network in ("teacher", "student", "student_control"):
        assert work.checkpoint(network).stat().st_ino == run.checkpoint(network).stat().st_ino  # links, not copies
    assert not work.path("data").exists()
    assert records_of(run) == records_of(done)

    # A teacher that was trained again since: all that the old one taught is deleted.
    shutil.copy(run.checkpoint("student_control"), tmp_path / "another")
    (tmp_path / "another").replace(run.checkpoint("teacher"))
    trained: list[str] = []
    monkeypatch.setattr(ablation, "train_student", lambda work, name, targets: trained.append(name))
    monkeypatch.setattr(ablation, "score_row", lambda work, name: [])
    with pytest.raises((FileNotFoundError, ConfigError)):  # the students that were not really trained
        ablate(run, [0])
    assert trained == ["student", "student_control", "student_undenoised"]
    assert not work.checkpoint("student_undenoised").exists()


def test_networks_of_another_seeds_run_are_taken_over(done: Run, tmp_path: Path) -> None:
    run, other = tiny_run(tmp_path / "seed5", "seed=5"), tiny_run(tmp_path / "finished")
    shutil.copytree(done.path("ablation/seed0"), other.folder, dirs_exist_ok=True)
    names = ("01_data", "02_classifier", "03_multi_scale_attention", "05_self_training")
    write_manifest(other.folder, {"stages": {name: {"status": "complete"} for name in names}})
    ablate(run, [0], ["no_self_training", "control"], [other])
    work = work_of(run)
    assert work.checkpoint("student_control").stat().st_ino == other.checkpoint("student_control").stat().st_ino
    assert not work.path("data").exists() and not work.checkpoint("student_undenoised").exists()
    wanted = [record for record in records_of(done) if record["variant"] in ("no_self_training", "control")]
    assert records_of(run) == wanted
    # The next call makes another row; the first two stay.
    ablate(run, [0], ["no_crf"], [other])
    assert {record["variant"] for record in records_of(run)} == {"no_self_training", "control", "no_crf"}
    unlike = tiny_run(tmp_path / "unlike", "attention.bg_score=0.31")
    with pytest.raises(ConfigError, match=r"the run unlike has other settings .*attention\.bg_score"):
        ablate(run, [0], sources=[unlike])
    with pytest.raises(ConfigError, match="no row 'no_students' in the ablation; there are full, no_fusion"):
        ablate(run, [0], ["full", "no_students"])


def test_oracle_threshold_is_searched_on_some_images_and_evaluated_on_all(
    done: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, refined = work_of(done), []
    monkeypatch.setattr(ablation, "ORACLE_IMAGES", 3)

    def note(samples: Samples, maps: FusedMaps, bg_score: float, *_: Any, **__: Any) -> list[Tensor]:
        refined.append((samples.image_ids, maps.image_ids, bg_score))
        # The masks are best at 0.4, by a pixel of the background that is right.
        true = [sample.mask for sample in samples.with_masks()]
        return [mask * 0 if bg_score == 0.4 else mask * 0 + 1 for mask in true if mask is not None]

    monkeypatch.setattr(ablation, "pseudo_masks", note)
    records = score_row(work, FULL)
    ids, own = work.samples().image_ids, done.config.attention.bg_score
    assert [asked for asked, _, _ in refined] == [ids[::3]] * (len(refined) - 2) + [ids] * 2
    assert all(asked == maps for asked, maps, _ in refined)
    assert [score for _, _, score in refined[-2:]] == sorted([own, 0.4])
    assert {r["bg_score"] for r in records if r["bg_choice"] == "oracle"} == {0.4}


def test_students_of_a_borrowed_teacher_are_not_mixed_with_those_of_another(
    done: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tmp_path / "incomplete")  # so it lends no teacher, and the ablation trains its own
    folder = run.path("ablation/seed0")
    shutil.copytree(done.path("ablation/seed0"), folder)
    (folder / "checkpoints/teacher.safetensors").unlink()
    (folder / "teacher.sha256").write_text("of the one that was borrowed last time")
    for left in ("checkpoints/student_undenoised.safetensors", "scores/full.json"):
        (folder / left).write_text("of the borrowed one")
    ablate(run, [0])
    assert records_of(run) == records_of(done)


def test_what_another_teachers_maps_decided_goes_with_them(copy: Run) -> None:
    work = work_of(copy)
    work.path("teacher.sha256").write_text("another one")
    ablation._drop_what_another_teacher_taught(work)
    left = {path.relative_to(work.folder).as_posix() for path in work.folder.rglob("*") if path.is_file()}
    # bg_score: auto was chosen from the maps that are gone.
    assert not [name for name in left if name.startswith(("bg_scores/", "scores/", "cams/", "checkpoints/student"))]
    assert "checkpoints/teacher.safetensors" in left


def test_another_seed_has_data_of_its_own(done: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run(tmp_path / "seeds")
    works: list[SeedWorkspace] = []

    def note(work: SeedWorkspace, rows: Any, log: Any) -> list[dict[str, Any]]:
        works.append(work)
        return []

    monkeypatch.setattr(ablation, "ablate_seed", note)
    ablate(run, [0, 3])
    assert [work.config.seed for work in works] == [0, 3] == [work.make_runtime().seed for work in works]
    first, second = (work.samples()[0].image for work in works)
    assert not torch.equal(first, second)
    assert torch.equal(first, work_of(done).samples()[0].image)


# --- what cannot be ---------------------------------------------------------------------------------------------------


def test_what_an_ablation_cannot_do_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one seed"):
        ablate(tiny_run(tmp_path / "none"), [])
    with pytest.raises(ConfigError, match="rounds is 2"):
        ablate(tiny_run(tmp_path / "rounds", "self_training.rounds=2"), [0])
    run = tiny_run(tmp_path / "busy")
    with locked(run.path("ablation"), "smaf"), pytest.raises(RunError, match="another smaf ablate"):
        ablate(run, [0])


def test_without_ground_truth_there_is_nothing_to_evaluate(done: Run) -> None:
    blind = work_of(done)
    blind._samples["train"] = blind.samples().subset([])
    with pytest.raises(DataError, match=r"data\.masks"):
        score_row(blind, FULL)


# --- reading ----------------------------------------------------------------------------------------------------------


def by_hand(*values: tuple[str, int, float]) -> list[dict[str, Any]]:
    return [
        {
            "variant": name,
            "seed": seed,
            "bg_choice": choice,
            "bg_score": 0.3,
            "object_size": size,
            "value": value + more,
        }
        for name, seed, value in values
        for choice, more in (("own", 0.0), ("oracle", 0.1))
        for size in ("all", "small", "medium", "large")
    ]


def test_table_by_hand() -> None:
    records = by_hand((FULL, 0, 0.5), (FULL, 1, 0.7), ("no_crf", 0, 0.4), ("no_crf", 1, 0.5))
    records = [r | {"value": None} if r["object_size"] == "small" else r for r in records]
    table = ablation_table(records)
    assert table.index.tolist() == ["the whole chain", "without CRF"]
    assert table.loc["the whole chain"].tolist() == [
        "60.0 ± 14.1",
        "–",
        "60.0 ± 14.1",
        "60.0 ± 14.1",
        "–",
        "70.0 ± 14.1",
        "–",
    ]
    assert table.loc["without CRF", "mIoU"] == "45.0 ± 7.1"
    assert table.loc["without CRF", "to full"] == "-15.0 ± 7.1"  # -10 and -20: by seed, not of the means
    one_seed = ablation_table(by_hand((FULL, 0, 0.5), ("no_crf", 0, 0.4)))
    assert one_seed.loc["without CRF", "to full"] == "-10.0"


def test_figure_has_a_dot_for_each_seed() -> None:
    figure = plot_ablation(by_hand((FULL, 0, 0.5), (FULL, 1, 0.7), ("no_crf", 0, 0.4), ("no_crf", 1, 0.5)), LABELS)
    assert [axis.get_title() for axis in figure.axes] == [
        "mIoU, all pixels",
        "small objects",
        "medium objects",
        "large objects",
    ]
    dots = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert [sorted(float(x) for x in line.get_xdata()) for line in dots] == [[50.0, 70.0], [40.0, 50.0]]


def test_result_says_where_it_comes_from(done: Run) -> None:
    result = read_ablation(done)
    assert result is not None
    assert result["seeds"] == [0] and result["settings"]["data"]["num_train"] == 7
    assert set(result) >= {"command", "finished", "git_commit", "packages", "device", "variants"}
    assert result["command"].startswith("smaf ablate configs/mini.yaml --name tiny")
    assert result["command"].endswith("--seeds 0")


def test_new_result_is_an_input_of_notebook_08_alone(copy: Run) -> None:
    def inputs(name: str) -> dict[str, Any]:
        stage = stage_named(name)
        return stage_inputs(copy.folder, stage, PROJECT_ROOT / "notebooks" / f"{stage.name}.ipynb", {})

    before = inputs("08"), inputs("07")
    copy.path(RESULT).unlink()
    after = inputs("08"), inputs("07")
    assert before[0] != after[0] and before[1] == after[1]
    assert {key for key in before[0] if before[0][key] != after[0][key]} == {"extra_inputs"}


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pretend(run: Run, seeds: Sequence[int], rows: Sequence[str], sources: Sequence[Run]) -> Path:
        assert list(rows) == ["full", "control"] and list(sources) == []
        run.path("ablation").mkdir()
        run.path(RESULT).write_text(
            json.dumps({"seeds": seeds, "records": by_hand(*((FULL, seed, 0.5) for seed in seeds))})
        )
        return run.path(RESULT)

    monkeypatch.setattr(ablation, "ablate", pretend)
    config = str(PROJECT_ROOT / "configs" / "mini.yaml")
    words = ["ablate", config, "--seeds", "4,5", "--name", "x", "--runs", str(tmp_path), "--set", "num_threads=1"]
    for name in ("../escaped", "..", "", str(tmp_path / "absolute")):
        refused = CliRunner().invoke(app, ["ablate", config, "--name", name, "--runs", str(tmp_path / "runs")])
        assert refused.exit_code == 2 and "plain folder name" in refused.output
        assert not list(tmp_path.iterdir())
    words += ["--rows", "full,control"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "50.0 ± 0.0" in result.output and "ablation.json" in result.output
    wrong = CliRunner().invoke(app, ["ablate", config, "--seeds", "a,b", "--runs", str(tmp_path)])
    assert wrong.exit_code == 2


def test_ablate_seed_tells_what_it_does(copy: Run) -> None:
    said: list[str] = []
    assert len(ablate_seed(work_of(copy), log=said.append)) == len(ROWS) * 8
    assert said[0] == "seed 0: teacher"
    assert command(copy, [0, 1]).endswith("--seeds 0,1")
