"""Custom data sets: ``data.kind: package.module:attribute``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from smaflib.config import Config
from smaflib.data import Sample, SampleFiles, Samples, load_samples
from smaflib.errors import InputError

CHANGE: dict[str, Any] = {}
"""What the data set below does differently: fields of its list, of its files, or of its samples."""


def read(files: SampleFiles, num_classes: int) -> Sample:
    label = torch.zeros(num_classes)
    label[list(files.labels)] = 1
    mask = torch.zeros(4, 5, dtype=torch.uint8) if files.mask else None
    parts = {"image": torch.zeros(3, 4, 5, dtype=torch.uint8), "image_label": label, "mask": mask}
    return Sample(files.image_id, **(parts | CHANGE.get("sample", {})))


def load(data: Any, split: str) -> Samples:
    files = [SampleFiles(f"{split}{i}", data.root, (i % 2,), mask=data.root) for i in range(4)]
    files = CHANGE.get("files", files)
    return Samples(tuple(files), CHANGE.get("class_names", ("a", "b")), split, read)


def config(root: Path, **data: Any) -> Config:
    settings = {"kind": "test_data_custom:load", "root": str(root)}
    return Config.model_validate({"data": settings | data, "classifier": {"pretraining": "plain"}})


def test_custom_data_set_is_loaded_by_its_name_and_limited(tmp_path: Path) -> None:
    samples = load_samples(config(tmp_path, max_images=3), "val")
    assert len(samples) == 3 and samples.split == "val" and samples[0].mask is None
    assert samples.with_ground_truth()[1].mask is not None
    assert samples.image_labels.tolist() == [[1, 0], [0, 1], [1, 0]]


ONE = SampleFiles("a", Path("a"), (0,), mask=Path("a"))
CHANGES: list[tuple[str, Any, str]] = [
    ("files", [], "the training split is empty"),
    ("files", [ONE, ONE], "the image_id 'a' is given twice"),
    ("files", [SampleFiles("a/b", Path("a"), (0,))], "the image_id 'a/b' is given twice or cannot be a file name"),
    ("files", [SampleFiles("a", Path("a"), (2,))], r"the labels of a are \(2,\), not below 2"),
    ("class_names", ("a", "a"), "'a' is given twice"),
    ("sample", {"image": torch.zeros(3, 4, 5)}, "train0 needs an image of uint8"),
    ("sample", {"image_label": torch.tensor([0.0, 1.0])}, "and the image_label of its files"),
]


@pytest.mark.parametrize(("part", "value", "words"), CHANGES)
def test_data_set_that_breaks_its_contract_is_refused(
    part: str, value: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHANGE, part, value)
    with pytest.raises(InputError, match=words):
        load_samples(config(tmp_path), "train")
