"""The recipe for custom photos is the one that was chosen by folds."""

import numpy as np
from PIL import Image

from benchmarks.own_photos import RESULTS, make_folder
from smaflib import files
from smaflib.config import load_config
from smaflib.data import load_samples
from smaflib.data.classes import VOC_CLASSES


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
