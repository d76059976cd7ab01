"""The page of results on real photos: from runs to tables."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from smaflib.config import load_config
from smaflib.files import PROJECT_ROOT
from smaflib.runs import open_run
from smaflib.runs.manifest import read_manifest, write_manifest
from tools import real_photos, real_photos_curves

STAGE = {"status": "complete", "started": "2026-11-25T03:00:00+00:00", "seconds": 120.0, "peak_memory_mb": 900}
FACTS = {"device": "cpu (x86_64)", "precision": "bf16", "git_commit": "0123456789", "packages": {"torch": "2.15"}}


def record(variant: str, value: float, **where: Any) -> dict[str, Any]:
    return {"variant": variant, "split": "train", "metric": "iou", "class_name": "mean", "value": value} | where


@pytest.fixture
def papermill_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Finished chains of seeds 0 and 1, of seed 0 also on true masks, and a plain one; numbers by hand."""
    monkeypatch.setattr(real_photos, "RUNS_FOLDER", tmp_path)
    for name, seed, gain, network in (
        ("voc12-small", 0, 0.0, "segmentation"),
        ("voc12-small-seed1", 1, 0.02, "segmentation"),
        ("voc12-small-supervised", 0, 0.0, "full_supervision"),
        ("voc12-small-plain", 0, -0.1, ""),
    ):
        settings = [f"seed={seed}", "data.root=/home/somebody/VOC2012"]
        run = open_run(tmp_path / name, PROJECT_ROOT / real_photos.PRESET, settings)
        maps = [record("teacher", 0.3 + gain, scale=0.5), record("teacher", 0.5 + gain, scale=1.0)]
        maps += [record("teacher_fused", 0.52 + gain, fusion="sum")]
        small = [
            row | {"object_size": "small", "value": value} for row, value in zip(maps, (0.1, 0.08, 0.15), strict=True)
        ]
        run.record("03_multi_scale_attention", maps + small)
        masks = [record("teacher_fused_refined", 0.6 + gain), record("pseudo_masks", 0.63 + 2 * gain)]
        masks += [record("control_fused_refined", 0.62 + gain), record("teacher_refined", 0.58)]
        per_class = record("pseudo_masks", 0.7 + gain, class_name="cat")
        run.record("06", [*masks, record("pseudo_masks", 0.3 + gain, object_size="small"), per_class])
        if network:
            better = 0.125 * (network == "full_supervision")
            run.record("07_segmentation", [record(network, 0.5 + gain + better, split="val")])
        manifest = {"stages": {"03_multi_scale_attention": STAGE, "06_pseudo_masks": STAGE}, **FACTS}
        write_manifest(run.folder, manifest | {"config_file": real_photos.PRESET, "overrides": settings})
        run.path("bg_scores").mkdir()
        run.path("bg_scores", "teacher.json").write_text(json.dumps({"bg_score": 0.3}))
    return tmp_path


def test_every_planned_run_is_one_of_the_preset() -> None:
    planned = list(real_photos.planned_runs())
    assert len({run.name for run in planned}) == len(planned) == 3 + 3 + 1 + 3 + 2 + 1 + 2
    for run in planned:
        load_config(PROJECT_ROOT / real_photos.PRESET, run.settings)
    assert {run.seed for run in planned if run.kind == "chain"} == {0, 1, 2}


def test_tables_of_finished_runs_by_hand(papermill_runs: Path) -> None:
    result = real_photos.collect({})
    tables = real_photos.tables(result)
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in tables["results"].splitlines()}
    assert lines["teacher, scale 1"] == "| teacher, scale 1 | train | 50.0 52.0 | 51.0 ± 1.4 | 8.0 |  |  | 40.0 |"
    assert lines["teacher, fused (sum)"].endswith("| 52.0 54.0 | 53.0 ± 1.4 | 15.0 |  |  | 42.0 |")
    assert "| 63.0 67.0 | 65.0 ± 2.8 | 31.0 |" in lines["pseudo masks (student, fused + CRF)"]
    assert lines["segmentation network"].startswith("| segmentation network | val | 50.0 52.0 |")
    assert "against the best single scale, all objects | +2.0 +2.0 | +2.0 ± 0.0 | +2.0 | +2.0 |" in tables["claims"]
    claims = dict(line.split(", small objects | ") for line in tables["claims"].splitlines() if "small" in line)
    by_hand = {"against the best single scale": 5.0, "against scale 1": 7.0}  # small objects: 10, 8, fused 15
    for words, gap in by_hand.items():
        found = [cells for label, cells in claims.items() if words in label]
        assert found == [f"{gap:+.1f} {gap:+.1f} | {gap:+.1f} ± 0.0 | {gap:+.1f} | {gap:+.1f} |"]
    assert "student + CRF against teacher + CRF | +3.0 +5.0 | +4.0 ± 1.4 | -7.0 | -7.0 |" in tables["claims"]
    assert "fused against single-scale targets | +1.0 +3.0 | +2.0 ± 1.4 | -9.0 | -9.0 |" in tables["claims"]
    assert tables["goals"].splitlines()[2:-1] == [
        "| plain teacher, fused + CRF | >= 54.0 | 50.0 | 1 | no |",
        "| EPS teacher, fused + CRF | >= 69.0 | 61.0 ± 1.4 | 2 | no |",
        "| pseudo masks: student, fused + CRF | >= 71.0 | 65.0 ± 2.8 | 2 | no |",
        "| segmentation network, on the 200 | >= 52.0 | 51.0 ± 1.4 | 2 | no |",
        "| segmentation network, as a share of the same network learned from true masks | >= 0.90 | 0.80 | 1 | no |",
    ]
    assert "| cat | 71.0 ± 1.4 |" in tables["classes"]
    assert "| 900 | 61.0 ± 1.4 | 65.0 ± 2.8 | +3.0 +5.0 | 51.0 ± 1.4 |" in tables["photos"]
    head, _, *summary = tables["summary"].splitlines()
    assert "2 seeds" in head
    assert [line.split(" | ")[1] for line in summary] == [
        "51.0 ± 1.4",  # scale 1
        "53.0 ± 1.4",  # fused
        "61.0 ± 1.4",
        "65.0 ± 2.8",
        "63.0 ± 1.4",
        "51.0 ± 1.4",
        "62.5 (1 seed)",  # true masks
    ]
    assert (
        "| `voc12-small-seed1` | 2026-11-25 | 4 | 0.9 | teacher 0.3 | 01234567 | cpu (x86_64), bf16, torch 2.15 |"
        in (tables["runs"])
    )
    assert "somebody" not in json.dumps(result)  # whose folders they are does not show


def test_numbers_of_other_machines_stay_while_the_preset_does(papermill_runs: Path) -> None:
    made = real_photos.collect({})
    other = made["runs"]["voc12-small-seed1"]
    elsewhere = {"voc12-small-seed2": other | {"seed": 2}, "voc12-small": other, "voc12-small-seed9": other}
    kept = {"preset": made["preset"], "runs": elsewhere, "ablation": {"seeds": [0]}, "ablation_paper": None}
    merged = real_photos.collect(kept)
    assert list(merged["runs"]) == [
        "voc12-small",
        "voc12-small-supervised",
        "voc12-small-seed1",
        "voc12-small-seed2",
        "voc12-small-plain",
    ]
    assert merged["runs"]["voc12-small"] == made["runs"]["voc12-small"]  # what is on this machine is newer
    assert merged["ablation"] == {"seeds": [0]}
    assert real_photos.collect(kept | {"preset": "of another recipe"}) == made


def test_a_run_that_is_not_finished_is_left_out(papermill_runs: Path) -> None:
    folder = papermill_runs / "voc12-small"
    manifest = read_manifest(folder)
    manifest["stages"]["07_segmentation"] = STAGE | {"status": "running"}
    write_manifest(folder, manifest)
    assert list(real_photos.collect({})["runs"]) == ["voc12-small-supervised", "voc12-small-seed1", "voc12-small-plain"]


def test_run_that_had_the_machine_to_itself_by_hand(papermill_runs: Path) -> None:
    result = real_photos.collect({})
    assert real_photos.tables(result)["alone"] == "Not run."
    shutil.copytree(papermill_runs / "voc12-small", papermill_runs / "voc12-small-alone")
    manifest = read_manifest(papermill_runs / "voc12-small-alone")
    manifest["stages"]["06_pseudo_masks"] |= {"seconds": 90.0, "peak_memory_mb": 1234}
    write_manifest(papermill_runs / "voc12-small-alone", manifest)
    table = real_photos.tables(real_photos.collect({}))["alone"]
    assert "| `03_multi_scale_attention` | 2.0 | 0.9 |" in table and "| **all** | 3.5 | 1.2 |" in table
    assert "| **pseudo masks**: student's, fused, dense CRF | 63.0 | 63.0 |" in table


def test_ablation_by_hand() -> None:
    records = [
        {"variant": name, "seed": seed, "bg_choice": choice, "object_size": "all", "value": value}
        for choice in ("own", "oracle")
        for name, seed, value in (
            ("full", 0, 0.6),
            ("full", 1, 0.7),
            ("control", 0, 0.5),
            ("control", 1, 0.62),
            ("no_crf", 0, 0.4),
            ("no_denoising", 0, 0.55),
            ("no_denoising", 1, 0.68),
        )
    ]
    tables = real_photos.tables({"runs": {}, "ablation": {"records": records}, "ablation_paper": None})
    assert tables["ablation_paper"] == "The ablation is not finished."
    table, ledger = tables["ablation"], tables["ledger"].splitlines()
    assert "| the whole chain | 2 | 65.0 ± 7.1 |  |" in table
    assert "| control: single-scale targets | 2 | 56.0 ± 8.5 | -9.0 ± 1.4 |" in table
    assert "| without CRF | 1 | 40.0 | -20.0 | 40.0 | -20.0 |" in table
    denoised, reactivated = ([line for line in ledger if f"| {step}" in line] for step in ("denoised", "reactivated"))
    assert "| +3.5 ± 2.1 (2 seeds) |" in denoised[0]
    assert denoised[0].endswith(" | >= +1.0 | shown |")
    assert reactivated[0].endswith(" | not run |")


@pytest.mark.parametrize(
    ("ours", "plain", "by_rule", "verdict"),
    [
        ([], [3.0], [3.0], "not run"),
        ([1.0, 3.0], [], [], "shown"),
        ([1.0, 2.0], [], [], "not shown"),
        ([1.0, 2.0], [1.0, 2.9], [1.0], "not shown"),
        ([1.0, 2.0], [1.0, 3.0], [], "shown in plain mode only"),
        ([1.0, 2.0], [1.0], [2.0], "shown by the paper's rule only"),
        ([1.0, 2.0], [2.0], [2.0], "shown in plain mode and by the paper's rule only"),
    ],
)
def test_verdict_is_on_means_and_names_the_mode(
    ours: list[float], plain: list[float], by_rule: list[float], verdict: str
) -> None:
    of = [pd.Series(values, dtype=float) for values in (ours, plain, by_rule)]
    others = {"in plain mode": of[1], "by the paper's rule": of[2]}
    assert real_photos._verdict(of[0], others, 2.0) == verdict


def test_what_was_tried_by_hand(papermill_runs: Path) -> None:
    measured = {key: {"mIoU": value} for key, value in (("fused", 60), ("refined_auto", 61.25), ("refined_oracle", 62))}
    record = {"run": "voc12-small", "seed": 0, "control": False, "settings": ["pseudo_masks.saliency_weight=0"]}
    records = [record | measured | {"variant": "teacher, no saliency"}, record | measured | {"run": "mini"}]
    again = record | measured | {"variant": "teacher, no saliency", "run": "voc12-small-seed1", "seed": 1}
    fewer = record | measured | {"variant": "student", "run": "voc12-small-300", "refined_auto": {"mIoU": 70}}
    table = real_photos._tried([fewer, *records, again]).splitlines()
    assert len(table) == 4  # the mini set's is left out
    assert table[3].startswith("| student | `pseudo_masks.saliency_weight=0` | 300 | 0 |")
    expected = (
        "| teacher, no saliency | `pseudo_masks.saliency_weight=0` | 900 | 0 1 | 60.0 ± 0.0 | 61.2 ± 0.0 | 62.0 ± 0.0 |"
    )
    assert table[2] == expected
    settings = [real_photos.PAPERS_RULE[3], "self_training.targets=hard", *real_photos.PAPERS_RULE[:3]]  # in any order
    by_rule = record | measured | {"variant": "hard", "control": True, "settings": settings}
    cells = "| hard | single-scale targets, all by the paper's rule, `self_training.targets=hard` | 900 | 0 |"
    assert real_photos._tried([by_rule]).splitlines()[2].startswith(cells)
    students = [
        record | measured | {"variant": "student, no saliency", "seed": seed, "refined_auto": {"mIoU": 62.25 + seed}}
        for seed in (0, 1, 2)
    ]
    of_preset = record | measured | {"variant": "student", "settings": []}
    rows = real_photos._frame(real_photos.collect({}), "rows")
    assert real_photos._goals(rows, [of_preset]).endswith("| >= -1.0 | -0.8 | 1 | yes |")
    gaps = real_photos._gaps_of_trials([fewer, *records, again, *students])
    assert [list(gap) for gap in gaps.values()] == [[1.0, 2.0]]  # seed 2 has no teacher, and there is no control


def test_table_of_the_crf_at_test_time_by_hand() -> None:
    others = {"run": "voc12-small-300", "split": "others", "images": 200}
    val = {"run": "voc12-small", "split": "val", "images": 199}
    records = [
        others | {"crf": "none", "mIoU": 40.0},
        others | {"crf": "deeplab", "mIoU": 41.26},
        val | {"crf": "none", "mIoU": 50.0},
        val | {"crf": "none", "mIoU": 90.0, "run": "mini"},
    ]
    assert real_photos._test_crf(records).splitlines() == [
        "| photos learned from | evaluated on | no CRF | deeplab |",
        "| --- | --- | --- | --- |",
        "| 300 | 200, of the 900, not learned from | 40.0 | 41.3 |",
        "| 900 | 199, validation | 50.0 |  |",
    ]


def test_gaps_of_hard_targets_by_hand(papermill_runs: Path) -> None:
    rule = list(real_photos.PAPERS_RULE)
    trials = (  # seed 1 has no single-scale targets
        ("teacher, no saliency", rule[3:], False, {0: 57.0, 1: 58.0}),
        ("the paper's rule", rule, False, {0: 10.0, 1: 10.0}),
        ("the paper's rule, hard", ["self_training.targets=hard", *rule], False, {0: 58.5, 1: 58.25}),
        ("the paper's rule, hard, one scale", ["self_training.targets=hard", *rule], True, {0: 56.0}),
    )
    records = [
        {"run": run, "seed": seed, "control": control, "settings": settings, "variant": variant}
        | {key: {"mIoU": value} for key in real_photos.MEASURED}
        for variant, settings, control, of_seed in trials
        for (seed, value), run in zip(of_seed.items(), ("voc12-small-300", "voc12-small-seed1-300"), strict=False)
    ]
    gaps = real_photos._gaps_of_trials(records)
    assert [list(gap) for gap in gaps.values()] == [[1.5, 0.25], [2.5]]
    assert all("hard targets (every third of 300 photos)" in label for label in gaps)
    result = real_photos.collect({})
    (cells,) = (
        line.split(" | ")
        for line in real_photos._ledger(real_photos._frame(result, "rows"), records, result).splitlines()
        if "| fused targets" in line
    )
    assert cells[5] == "+2.5 (1 seed)"


def test_runs_of_other_machines_are_not_made_again(
    papermill_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_photos, "JSON", tmp_path / "page.json")
    monkeypatch.setattr(real_photos, "write_page", lambda: None)
    made: list[str] = []
    monkeypatch.setattr(real_photos, "_smaf", lambda *words: made.append(words[words.index("--name") + 1]))
    elsewhere = {"preset": real_photos.preset_hash(), "runs": {"voc12-small-seed2": {}, "voc12-small": {}}}
    real_photos.JSON.write_text(json.dumps(elsewhere), encoding="utf-8")
    real_photos.make_runs(tmp_path, tmp_path, ["chain"])
    assert made == ["voc12-small", "voc12-small-seed1"]  # this machine has a folder of seed 0: resumed
    real_photos.JSON.write_text(json.dumps(elsewhere | {"preset": "another"}), encoding="utf-8")
    real_photos.make_runs(tmp_path, tmp_path, ["chain"])
    assert made[2:] == ["voc12-small", "voc12-small-seed1", "voc12-small-seed2"]


def test_papers_rule_is_run_then_ablated_with_the_same_settings(
    papermill_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_photos, "JSON", tmp_path / "page.json")
    monkeypatch.setattr(real_photos, "write_page", lambda: None)
    (papermill_runs / "voc12-small-300").mkdir()  # its teacher is taken over
    made: list[tuple[str, ...]] = []
    monkeypatch.setattr(real_photos, "_smaf", lambda *words: made.append(words))
    real_photos.make_runs(tmp_path, tmp_path, ["paper"])
    run, ablation = made
    assert (run[0], ablation[0]) == ("run", "ablate")
    of_run, of_ablation = (words[words.index("--set") :] for words in made)
    assert of_run == (*of_ablation[:-2], "--reuse", "voc12-small-300", "--until", "pseudo_masks")
    assert of_ablation[-2:] == ("--seeds", "0")
    config = load_config(PROJECT_ROOT / real_photos.PRESET, [word for word in of_run if "=" in word])
    assert config.self_training.refine == "none" and config.pseudo_masks.saliency_weight == 0


def test_claims_by_the_papers_rule_by_hand(papermill_runs: Path) -> None:
    result = real_photos.collect({})
    result["runs"]["voc12-small-300-paper"] = result["runs"]["voc12-small"] | {"kind": "paper"}
    values = {"full": 0.6, "no_denoising": 0.55, "no_reactivation": 0.58, "control": 0.5}
    where = {"seed": 0, "bg_choice": "own", "object_size": "all"}
    records = [where | {"variant": name, "value": value} for name, value in values.items()]
    result["ablation_paper"] = {"records": records}
    found = real_photos._claims(real_photos._frame(result, "rows"), [], result).splitlines()
    ruled = [line.split(" | ") for line in found if "all by the paper's rule (300 photos)" in line]
    assert [(label[2], mean) for label, _, mean, *_ in ruled] == [
        ("2", "+5.0"),
        ("2", "+2.0"),
        ("3", "+3.0"),  # of the run itself, as every other run's
        ("4", "+1.0"),
    ]
    ledger = real_photos._ledger(real_photos._frame(result, "rows"), [], result).splitlines()
    (cells,) = (line.split(" | ") for line in ledger if "| reactivated" in line)
    assert (cells[2], cells[4]) == ("", "+2.0 (1 seed)")  # by the preset itself not run


def test_page_is_written_between_its_marks(
    papermill_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    readme = tmp_path / "README.md"
    for name, copy in (("PAGE", page), ("README", readme), ("LEDGER", tmp_path / "claims.md")):
        copy.write_text(getattr(real_photos, name).read_text(encoding="utf-8"), encoding="utf-8")
        monkeypatch.setattr(real_photos, name, copy)
    monkeypatch.setattr(real_photos, "JSON", tmp_path / "page.json")
    monkeypatch.setattr(real_photos, "CURVES", tmp_path / "curves.png")
    real_photos.write_page()
    assert real_photos.CURVES.is_file()
    first, in_readme = page.read_text(), readme.read_text()
    assert "| segmentation network | val | 50.0 52.0 |" in first and "## What was tried" in first
    assert "| **segmentation network**, new images | 51.0 ± 1.4 |" in in_readme and "## Two commands" in in_readme
    real_photos.write_page()
    assert (page.read_text(), readme.read_text()) == (first, in_readme)
    assert {run["seed"] for run in json.loads((tmp_path / "page.json").read_text())["runs"].values()} == {0, 1}
    page.write_text("no place for tables")
    with pytest.raises(ValueError, match="has no place for results"):
        real_photos.write_page()


def test_committed_page_holds_the_tables_of_the_committed_numbers() -> None:
    result = json.loads(real_photos.JSON.read_text(encoding="utf-8"))
    page = real_photos.PAGE.read_text(encoding="utf-8")
    made = real_photos.tables(result)
    ledger = real_photos.LEDGER.read_text(encoding="utf-8")
    for name, table in made.items():
        where = ledger if name in real_photos.LEDGER_TABLES else page
        assert name in real_photos.README_TABLES or table in where, f"{name}: python -m tools.real_photos page"
    readme = real_photos.README.read_text(encoding="utf-8")
    assert all(made[name] in readme for name in real_photos.README_TABLES), "python -m tools.real_photos page"


def test_curves_by_hand(tmp_path: Path) -> None:
    """Two seeds of the chain, one of 300 photos; what is of another kind or split is left out."""
    maps = {"stage": "03_multi_scale_attention", "split": "train", "fusion": ""}
    masks = {"stage": "06_pseudo_masks", "split": "train", "fusion": "", "scale": ""}
    of = {"scale": maps | {"variant": "teacher", "scale": "0.5"}, "val": maps | {"variant": "teacher", "scale": "0.5"}}
    of |= {"fused": maps | {"variant": "teacher_fused", "scale": "", "fusion": "sum"}}
    of |= {"max": of["fused"] | {"fusion": "max"}, "teacher": masks | {"variant": "teacher_fused_refined"}}
    of |= {"masks": masks | {"variant": "pseudo_masks"}}
    of["val"] = of["val"] | {"split": "val"}
    values = (
        ("chain", 0, {"scale": 50.0, "val": 10.0, "fused": 60.0, "max": 1.0, "teacher": 60.0, "masks": 62.0}),
        ("chain", 1, {"scale": 52.0, "fused": 60.0, "teacher": 64.0}),
        ("photos 300", 0, {"scale": 1.0, "teacher": 40.0, "masks": 43.0}),
    )
    rows = pd.DataFrame(
        [
            {"kind": kind, "seed": seed, "mIoU": value, "small": value / 2, "medium": value, "large": value} | of[row]
            for kind, seed, of_row in values
            for row, value in of_row.items()
        ]
    )
    points = real_photos_curves.curves(rows)
    found = {tuple(point[:3]): (point[3], point[4]) for point in points.itertuples(index=False)}
    assert found["object size over scale", "small objects", "0.5"] == (25.5, pytest.approx(0.5**0.5))
    assert found["object size over scale", "all objects", "fused"] == (60.0, 0.0)
    assert found["number of photos", "teacher's masks", "900"] == (62.0, pytest.approx(8**0.5))
    assert found["number of photos", "pseudo masks", "300"][0] == 43.0
    gains = points[points["panel"] == "what self-training gains"]
    assert gains[["line", "x", "mean"]].to_numpy().tolist() == [
        ["EPS, 900 photos", "60.000", 2.0],  # seed 1 has no student
        ["EPS, 300", "40.000", 3.0],
    ]
    picture = tmp_path / "curves.png"
    real_photos_curves.write_curves(picture, rows)
    made = picture.stat().st_mtime_ns
    real_photos_curves.write_curves(picture, rows)
    assert picture.stat().st_mtime_ns == made  # the same numbers
    real_photos_curves.write_curves(picture, rows.assign(mIoU=rows["mIoU"] + 1))
    assert picture.stat().st_mtime_ns != made


def test_committed_curves_show_the_committed_numbers() -> None:
    rows = real_photos._frame(json.loads(real_photos.JSON.read_text(encoding="utf-8")), "rows")
    shown = real_photos_curves.shown_digest(real_photos.CURVES)
    assert shown == real_photos_curves.digest(real_photos_curves.curves(rows)), "python -m tools.real_photos page"
