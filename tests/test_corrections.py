"""`smaf masks` again, after a person has edited tables and masks: what depends on it is made anew, nothing is lost."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers import mask_at
from test_custom_images import SETTINGS, write_table

from smaflib import pipeline
from smaflib.apps.corrections import Correction, read_corrections, write_correction
from smaflib.apps.masks import make_masks, open_masks
from smaflib.config import Config, check_settings
from smaflib.data.masks import read_mask, save_mask
from smaflib.errors import ConfigError, DataError

LABELS = [(f"{number}.png", ["red", "blue"][number % 2]) for number in range(6)]
OURS = {"masks", "made", "overlays", "overlays_before", "cams"}


@pytest.fixture
def folder(masks_folder: Path) -> Path:
    """Photos, a table, and ``out`` with finished masks; a copy is in ``kept``."""
    return masks_folder


def config_in(folder: Path, **data: object) -> Config:
    given = {"kind": "folder", "images": folder / "photos", "labels": folder / "labels.csv", "longest_side": 48}
    return check_settings(SETTINGS | {"data": given | data})


def contents(out: Path) -> dict[str, bytes]:
    """All files but networks and locks."""
    paths = [path for path in out.rglob("*") if path.is_file() and path.suffix != ".lock" and path.name != ".lock"]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths}


def changed(before: dict[str, bytes], after: dict[str, bytes]) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "masks.csv").open(newline="") as table:
        return list(csv.DictReader(table))


def draw(out: Path, name: str, size: tuple[int, int] = (40, 48)) -> np.ndarray:
    """A person's mask: the class in the upper left quarter."""
    mask = np.zeros(size, dtype=np.uint8)
    mask[: size[0] // 2, : size[1] // 2] = 1
    save_mask(out / "corrected" / f"{name}.png", mask)
    return mask


def made_by(out: Path, network: str) -> bool:
    """Whether the masks are those of a network, and shown."""
    work = open_masks(out)
    own = pipeline.write_masks(work, network, f"of {network}")
    pairs = list(zip(own, work.masks(work.samples(), "made"), strict=True))
    shutil.rmtree(work.path(f"of {network}"))
    return all(torch.equal(*pair) for pair in pairs) and (out / "index.html").is_file()


def test_edited_label_remakes_its_photo_alone_with_the_networks_that_exist(folder: Path) -> None:
    out = folder / "out"
    before = contents(out)
    write_table(folder / "labels.csv", [("0.png", "blue"), ("1.png", "blue;red"), *LABELS[2:]])
    make_masks(config_in(folder), out)
    after = contents(out)
    parts = {name.split("/")[0] for name in changed(before, after)}
    assert parts <= OURS | {"made.json", "masks.csv", "index.html"}
    assert {Path(name).name.split(".")[0] for name in changed(before, after) if "/" in name} <= {"0", "1"}
    assert set(np.unique(read_mask(out / "masks/0.png"))) <= {0, 1}  # blue is 1, and no longer red, 2
    assert len(rows_of(out)) == 7
    # and back: the same masks as before
    write_table(folder / "labels.csv", LABELS)
    make_masks(config_in(folder), out)
    assert contents(out) == before


def test_threshold_and_left_out_of_single_photos(folder: Path) -> None:
    out = folder / "out"
    before = contents(out)
    (out / "corrections.csv").write_text("image,bg_score,leave_out,note\n2.png,0.99,,too large\n\n3,,yes,blurred\n")
    make_masks(config_in(folder), out)
    found = {name for name in changed(before, contents(out)) if "/" in name}
    assert found == {
        f"{part}/{name}"
        for part, name in [("made", "2.png"), ("masks", "2.png"), ("overlays", "2.jpg"), ("overlays_before", "2.jpg")]
    } | {"masks/3.png", "overlays/3.jpg", "overlays_before/3.jpg"}
    assert not (out / "masks/3.png").exists()
    assert (read_mask(out / "masks/2.png") > 0).sum() < (
        read_mask(folder.with_name("kept") / "out/masks/2.png") > 0
    ).sum()
    assert rows_of(out)[-1] == {"image": "3.png", "label": "blue", "share": "", "confidence": "", "check": "left out"}
    assert "left out" in (out / "index.html").read_text()
    assert mask_at(open_masks(out), "2", 0.99).tolist() == read_mask(out / "made/2.png").tolist()
    write_correction(out, "3")
    write_correction(out, "2", bg_score=None)
    assert (out / "corrections.csv").read_text() == "image,bg_score,leave_out,note\n2.png,,,too large\n3,,,blurred\n"
    make_masks(config_in(folder), out)
    assert changed(before, contents(out)) == {"corrections.csv"}


def test_corrected_mask_replaces_the_made_one_and_counts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "out"
    before = contents(out)
    drawn = draw(out, "1")
    written = (out / "corrected/1.png").read_bytes()
    write_correction(out, "1", bg_score=0.5)
    make_masks(config_in(folder), out)
    assert read_mask(out / "masks/1.png").tolist() == drawn.tolist()
    made = read_mask(out / "made/1.png").numpy()
    ious = [((made == v) & (drawn == v)).sum() / ((made == v) | (drawn == v)).sum() for v in (0, 1)]
    text = f"mIoU of the made masks on 1 corrected photos, of which the networks learned 0: {50 * sum(ious):.1f} %"
    assert text in capsys.readouterr().out
    row = next(row for row in rows_of(out) if row["image"] == "1.png")
    assert row == {
        "image": "1.png", "label": "blue", "share": "0.250", "confidence": "1.000", "check": "corrected by hand"
    }  # fmt: skip
    drawn[0, 0] = 255
    save_mask(out / "corrected/1.png", drawn)
    make_masks(config_in(folder), out)
    assert read_mask(out / "masks/1.png")[0, 0] == 255  # a second repair is seen as well
    assert (out / "corrected/1.png").read_bytes() != written
    (out / "corrected/1.png").unlink()
    (out / "corrections.csv").unlink()
    make_masks(config_in(folder), out)
    assert changed(before, contents(out)) == set()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("image,bg_score,leave_out\n7.png,0.5,\n", r"line 2: '7\.png' is no photo of the table"),
        ("image,bg_score,leave_out\n\n1.png,1,\n", r"line 3: '1\.png': bg_score is '1': Input should be less than 1"),
        ("image,bg_score,leave_out\n1.png,nan,\n", "line 2: .*bg_score is 'nan'"),
        ("image,bg_score,leave_out\n1.png,often,\n", "line 2: .*bg_score is 'often'"),
        ("image,bg_score,leave_out\n1.png,,perhaps\n", "line 2: .*leave_out is 'perhaps'"),
        ("image,bg_score,leave_out\n1.png,0.2,\n1,0.3,\n", "line 3: 1 is already listed on line 2"),
        ("image,threshold\n1.png,0.2\n", "must name the columns image,bg_score,leave_out"),
        ("", "must name the columns"),
    ],
)
def test_bad_table_is_refused_before_anything_changes(folder: Path, text: str, problem: str) -> None:
    out = folder / "out"
    (out / "corrections.csv").write_text(text)
    before = contents(out)
    with pytest.raises(DataError, match=problem):
        make_masks(config_in(folder), out)
    assert contents(out) == before


def test_bad_mask_is_refused_before_anything_changes(folder: Path) -> None:
    out = folder / "out"
    for name, size, values, problem in (
        ("1", (20, 24), 1, r"corrected/1\.png is 24 x 20 pixels, but its image .*photos/1\.png is 48 x 40"),
        ("1", (40, 48), 3, r"corrected/1\.png holds the value 3"),
        ("9", (40, 48), 1, r"corrected/9\.png belongs to no photo"),
    ):
        shutil.rmtree(out / "corrected", ignore_errors=True)
        save_mask(out / "corrected" / f"{name}.png", np.full(size, values, dtype=np.uint8))
        before = contents(out)
        with pytest.raises(DataError, match=problem):
            make_masks(config_in(folder), out)
        assert contents(out) == before


def test_table_of_a_spreadsheet_is_read_and_kept_in_order(tmp_path: Path) -> None:
    (tmp_path / "corrections.csv").write_text(
        "image;bg_score;leave_out\nb.jpg;0,35;\na;;WAHR\n".replace("WAHR", "TRUE")
    )
    assert read_corrections(tmp_path) == {"b": Correction(bg_score=0.35), "a": Correction(leave_out=True)}
    write_correction(tmp_path, "c.d", 0.25)
    write_correction(tmp_path, "a", 0.5)
    assert read_corrections(tmp_path) == {
        "b": Correction(bg_score=0.35),
        "a": Correction(bg_score=0.5),
        "c.d": Correction(bg_score=0.25),
    }
    with pytest.raises(ValueError, match="less than 1"):
        write_correction(tmp_path, "a", 1.5)


def test_new_classes_and_photos_need_a_new_training_and_settings_another_folder(folder: Path) -> None:
    out = folder / "out"
    before = contents(out)
    write_table(folder / "labels.csv", [*LABELS[:5], ("5.png", "green")])
    with pytest.raises(ConfigError, match=r"class green; choose another --out, or give --retrain"):
        make_masks(config_in(folder), out)
    write_table(folder / "labels.csv", LABELS[:5])
    with pytest.raises(ConfigError, match=r"photo 5; choose"):
        make_masks(config_in(folder), out)
    write_table(folder / "labels.csv", LABELS)
    with pytest.raises(ConfigError, match=r"data\.longest_side: 40 \| 48"):
        make_masks(config_in(folder, longest_side=40), out)
    assert contents(out) == before


def test_retraining_learns_corrections_and_keeps_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, config = folder / "out", config_in(folder)
    config = config.model_copy(update={"self_training": config.self_training.model_copy(update={"refine": "crf"})})
    drawn = draw(out, "1")
    drawn[:, 24:] = 255  # nothing is said about the right half
    save_mask(out / "corrected/1.png", drawn)
    write_correction(out, "4", leave_out=True)
    (out / "labels.csv").write_text("mine")
    monkeypatch.setattr("smaflib.apps.masks.train_teacher", pipeline.train_teacher)
    with monkeypatch.context() as context:
        context.setattr("smaflib.self_training.self_train", learning := Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make_masks(config, out, retrain=True)
    assert made_by(out, "teacher")  # first masks, while the student is trained
    samples, targets = learning.call_args.args[1:3]
    assert samples.image_ids == ["0", "1", "2", "3", "5"]
    assert targets[1][:, :, :24].tolist() == [(drawn == value)[:, :24].astype(float).tolist() for value in (1, 2)]
    make_masks(config, out, retrain=True)
    assert made_by(out, "student") and not made_by(out, "teacher")
    once = contents(out)
    assert "of which the networks learned 1: " in capsys.readouterr().out
    assert (out / "labels.csv").read_text() == "mine" and read_corrections(out)["4"].leave_out
    make_masks(config, out, retrain=True)  # these were learned already
    assert contents(out) == once


@pytest.mark.parametrize("where", ["write_maps", "write_masks", "_write_overlays", "write_sheet"])
def test_interrupted_call_continues_to_the_same_bytes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, where: str, tmp_path: Path
) -> None:
    out = folder / "out"
    write_table(folder / "labels.csv", [("0.png", "blue"), *LABELS[1:]])
    draw(out, "1")
    write_correction(out, "2", 0.6)
    with monkeypatch.context() as context:
        context.setattr(f"smaflib.apps.masks.{where}", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make_masks(config_in(folder), out)
    make_masks(config_in(folder), out)
    resumed = contents(out)
    shutil.rmtree(out)
    shutil.copytree(folder.with_name("kept") / "out", out)
    draw(out, "1")
    write_correction(out, "2", 0.6)
    make_masks(config_in(folder), out)
    assert contents(out) == resumed
