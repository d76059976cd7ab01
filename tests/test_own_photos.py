"""The choice of the recipe for custom photos, by folds."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from benchmarks.own_photos import RESULTS, grow, make_folder, split
from smaflib import files
from smaflib.config import load_config
from smaflib.data import load_samples
from smaflib.data.classes import VOC_CLASSES


@given(st.integers(12, 120), st.data())
def test_folds_hold_every_photo_once_and_no_held_out_photo_was_seen_before(number, data):
    rows = [{"image": f"{k}.jpg", "labels": "cat"} for k in range(number)]
    tuned = data.draw(st.sets(st.integers(0, number - 1), max_size=number // 3))
    folds = split(rows, [f"{k}.jpg" for k in tuned])
    everything = [row["image"] for fold in folds.values() for row in fold]
    assert sorted(everything) == sorted(row["image"] for row in rows)
    held = [row["image"] for name, fold in folds.items() if name.startswith("final") for row in fold]
    assert len(held) == number // 3
    assert not {f"{k}.jpg" for k in tuned} & set(held)


def test_folds_worked_out_by_hand():
    rows = [{"image": str(k), "labels": "cat"} for k in range(6)]
    of = {name: [row["image"] for row in fold] for name, fold in split(rows, ["0"]).items()}
    assert of == {  # 2 of the 5 that are new, as far apart as can be: the first and the last
        "choose 0": ["0"],
        "choose 1": ["2"],
        "choose 2": ["3"],
        "choose 3": ["4"],
        "final 0": ["1"],
        "final 1": ["5"],
    }


def test_folders_grow_from_photos_that_no_choice_has_seen():
    rows = [{"image": str(k), "labels": "cat"} for k in range(240)]
    folds = split(rows)
    folders = grow(folds)
    assert [len(rows) for rows in folders.values()] == [5] * 3 + [20] * 2 + [40] * 2 + [100, 200]
    assert folders["curve 40 0"] == folds["final 1"] and folders["curve 40 1"] == folds["final 0"]
    assert folders["curve 5 1"] == folds["final 1"][5:10]


def test_a_fold_is_a_folder_with_the_classes_of_its_own_labels(tmp_path):
    cat, sofa, dog = (1 + VOC_CLASSES.index(name) for name in ("cat", "sofa", "dog"))
    photos = tmp_path / "photos"
    for folder in ("JPEGImages", "SegmentationClass"):
        (photos / folder).mkdir(parents=True)
    Image.new("RGB", (4, 2)).save(photos / "JPEGImages" / "a.jpg")
    stored = np.array([[0, cat, sofa, dog], [255, cat, cat, 0]], dtype=np.uint8)
    Image.fromarray(stored).save(photos / "SegmentationClass" / "a.png")
    settings = make_folder(photos, [{"image": "a.jpg", "labels": "sofa;cat"}], tmp_path / "fold")
    config = load_config("configs/custom.yaml", [*settings, "data.longest_side=null"])
    samples = load_samples(config, "train", tmp_path).annotated
    assert samples.class_names == ("cat", "sofa")
    # the dog, which no label names, counts neither for nor against
    assert samples.with_ground_truth()[0].mask.tolist() == [[0, 1, 2, 255], [255, 1, 1, 0]]


def test_the_preset_is_the_recipe_that_was_chosen():
    preset = load_config("configs/custom.yaml")
    chosen = [record for record in files.read_json(RESULTS, {})["records"] if record["recipe"].startswith("chosen")]
    assert {record["fold"].split()[0] for record in chosen} == {"choose", "final"}
    assert all(load_config("configs/custom.yaml", record["settings"]) == preset for record in chosen)
