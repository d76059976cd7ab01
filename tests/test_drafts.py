"""Labels for `smaf masks` without a table."""

from __future__ import annotations

import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from smaflib.apps.cli import app
from smaflib.apps.drafts import coarse_names
from smaflib.data import load_samples
from smaflib.sources.imagenet import KINDS, NUM_CLASSES, ImageNetClassifier, match_classes

DRAFTED = "are drafts from ImageNet's classifier: correct the table and give the same command again."


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (12, 8)).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Mock:
    """Takes the place of everything after the labels."""
    make = Mock(return_value=tmp_path / "out" / "index.html")
    monkeypatch.setattr("smaflib.apps.masks.make_masks", make)
    monkeypatch.chdir(tmp_path)
    return make


def masks(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["masks", "--images", "photos", "--out", "out", *words])
    return result.exit_code, " ".join(result.output.split())


def predicting(monkeypatch: pytest.MonkeyPatch, *photos: dict[int, float]) -> Mock:
    found = [torch.zeros(NUM_CLASSES).index_put((torch.tensor([*p]),), torch.tensor([*p.values()])) for p in photos]
    probabilities = Mock(side_effect=found)
    monkeypatch.setattr(ImageNetClassifier, "probabilities", probabilities)
    return probabilities


def test_labels_are_drafted_once_and_belong_to_the_user_afterwards(
    photos: Path, make: Mock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # A beagle and a pug are dogs, a pickup is a car and a truck, 963 is a pizza, 340 a zebra.
    asked = predicting(monkeypatch, {162: 0.06, 254: 0.05, 717: 0.5, 340: 0.09}, {963: 0.04})
    code, output = masks()
    assert code == 0 and f"The labels in out/labels.csv {DRAFTED}" in output
    table = tmp_path / "out" / "labels.csv"
    lines = table.read_text().splitlines()
    assert lines[0] == "image,labels,scores"
    assert lines[1].startswith("a.jpg,car;truck;dog,car 0.50;truck 0.50;dog 0.11;zebra 0.09;")
    assert lines[2].startswith("b.jpg,,pizza 0.04;")
    config, out, _ = make.call_args.args
    assert (config.data.labels, out) == (table, tmp_path / "out")
    assert load_samples(config, "train").class_names == ("car", "dog", "truck")
    mine = "image;labels\na.jpg;dog\nb.jpg;person\n"
    table.write_text(mine)
    assert masks()[1].startswith("Labels: out/labels.csv; delete it to have them made anew.")
    assert table.read_text() == mine and asked.call_count == 2
    assert load_samples(make.call_args.args[0], "train").class_names == ("dog", "person")


def test_a_list_of_class_names_is_all_that_is_drafted(
    photos: Path, make: Mock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    predicting(monkeypatch, {162: 0.06, 254: 0.05, 963: 0.8}, {665: 0.06, 670: 0.05, 831: 0.2})  # 963 is a pizza
    code, _ = masks("--set", "data.class_names=[person,motorbike,dog]")
    assert code == 0
    assert (tmp_path / "out" / "labels.csv").read_text().splitlines()[1:] == [
        "a.jpg,dog,dog 0.11;person 0.00;motorbike 0.00",
        "b.jpg,motorbike,motorbike 0.11;person 0.00;dog 0.00",
    ]
    assert load_samples(make.call_args.args[0], "train").image_labels.tolist() == [[0, 0, 1], [0, 1, 0]]


def test_subfolders_are_labels_and_photos_beside_them_show_none(photos: Path, make: Mock, tmp_path: Path) -> None:
    for folder in ("dog", "gr\u00fcner, Apfel", ".hidden", "dog/deeper", "empty"):
        (photos / folder).mkdir()
        if folder != "empty":
            Image.new("RGB", (12, 8)).save(photos / folder / f"{len(folder)}.png")
    code, output = masks()
    assert code == 0 and "are the names of the subfolders; photos beside these show none of them." in output
    table = (tmp_path / "out" / "labels.csv").read_text(encoding="utf-8")
    assert table == 'image,labels\na.jpg,\nb.jpg,\ndog/3.png,dog\n"gr\u00fcner, Apfel/13.png","gr\u00fcner, Apfel"\n'
    samples = load_samples(make.call_args.args[0], "train")
    assert samples.image_ids == ["a", "b", "3", "13"] and samples.class_names == ("dog", "gr\u00fcner, Apfel")
    assert samples.image_labels.tolist() == [[0, 0], [0, 0], [1, 0], [0, 1]]
    assert samples.files[3].image == photos / "gr\u00fcner, Apfel" / "13.png"


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda photos: (photos / "b.jpg").write_bytes(b"\xff\xd8\xff"), "b.jpg cannot be read as an image"),
        (lambda photos: shutil.copy(photos / "a.jpg", photos / "a.png"), "a.jpg and a.png would share the mask a.png"),
        (lambda photos: shutil.copytree(photos, photos / "c"), "a.jpg and c/a.jpg would share the mask a.png"),
        (lambda photos: [path.unlink() for path in photos.iterdir()], "photos holds no photo; name a folder of .jpg"),
        (lambda photos: shutil.rmtree(photos), "there is no folder"),
    ],
    ids=["damaged", "two-of-a-name", "two-folders", "empty", "nowhere"],
)
def test_photos_that_cannot_be_labelled_leave_nothing_behind(
    photos: Path, make: Mock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: Mock, words: str
) -> None:
    predicting(monkeypatch, {207: 0.9}, {207: 0.9})
    broken(photos)
    code, output = masks()
    assert code == 2 and words in output and not make.called and not (tmp_path / "out").exists()


def test_names_are_coarse_and_known_to_the_source_imagenet() -> None:
    names = coarse_names()
    assert names["dog"] == [*range(151, 269)] and names["dining table"] == [532] and names["timber wolf"] == [269]
    assert {number for numbers in names.values() for number in numbers} == {*range(NUM_CLASSES)}
    assert names["airplane"] == [404, 895] and names["carpenter's plane"] == [726]
    matched = match_classes([*names])
    assert all({*numbers} <= {*matched[name]} for name, numbers in names.items())
    assert "giraffe" not in names and 610 in names["person"] and len(KINDS) > 40  # in jerseys
