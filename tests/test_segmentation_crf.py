"""The benchmark of the CRF at test time."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers import tiny_config

from benchmarks.segmentation_crf import CRFS, label, measure
from smaflib.config import CRF_PRESETS
from smaflib.data import make_data
from smaflib.pipeline import Workspace, train_segmentation


def test_crf_takes_the_softmax_and_none_takes_the_most_probable() -> None:
    # A grey pixel alone that is just barely not of its neighbours' class.
    image = torch.full((3, 9, 9), 128, dtype=torch.uint8)
    probabilities = torch.tensor([0.8, 0.2])[:, None, None].repeat(1, 9, 9)
    probabilities[:, 4, 4] = torch.tensor([0.49, 0.51])
    assert label(image, probabilities, "none").nonzero().tolist() == [[4, 4]]
    assert all(not label(image, probabilities, name).any() for name in CRFS)
    assert set(CRFS) <= set(CRF_PRESETS)


def test_records_of_a_run(tmp_path: Path) -> None:
    data = {"num_train": 6, "num_val": 2, "image_size": 64, "cache": True}
    config = tiny_config(data=data, segmentation={"supervision": "ground_truth"})
    work = Workspace(tmp_path, config)
    make_data(config, tmp_path)
    train_segmentation(work)
    without, soft = measure(work, work.samples("val").with_ground_truth, ["soft"])
    assert (without["crf"], soft["crf"], soft["images"]) == ("none", "soft", 2)
    assert 0 < without["mIoU"] <= 100 and soft["seconds_per_image"] >= 0
