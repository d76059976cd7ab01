"""The lazy list of samples."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from helpers import make_samples

from smaflib.data.sample import Sample, SampleFiles, Samples
from smaflib.errors import DataError


class Reader:
    """Notes which parts of which sample are read."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, files: SampleFiles, num_classes: int) -> Sample:
        parts = [name for name in ("saliency", "mask") if getattr(files, name)]
        self.calls.append(" ".join([files.image_id, *parts]))
        return Sample(files.image_id, torch.zeros(3, 2, 2, dtype=torch.uint8), torch.zeros(num_classes))


def recorded(num: int = 4, cached: bool = False) -> tuple[Samples, Reader]:
    reader = Reader()
    files = tuple(SampleFiles(f"i{n}", Path("x"), (n % 2,), Path("s"), Path("m")) for n in range(num))
    return Samples(files, ("cat", "dog"), "val", reader, cached), reader


def test_nothing_is_read_before_it_is_asked_for() -> None:
    samples, reader = recorded()
    assert len(samples) == 4 and samples.image_ids == ["i0", "i1", "i2", "i3"]
    assert samples.image_labels.tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]
    assert samples[1:].subset([0]).with_ground_truth().has_ground_truth
    assert reader.calls == []
    assert samples[-1].image_id == "i3"
    assert reader.calls == ["i3"]


def test_saliency_and_ground_truth_are_read_on_request() -> None:
    samples, reader = recorded()
    evaluated = samples.with_ground_truth()
    evaluated[0], evaluated[1:][0], evaluated.subset([2])[0], samples[3]
    samples.with_saliency()[1], samples.with_saliency().with_ground_truth()[2:][0], samples[1]
    assert reader.calls == ["i0 mask", "i1 mask", "i2 mask", "i3", "i1 saliency", "i2 saliency mask", "i1"]


def test_cache_reads_once_and_never_gives_one_samples_picture_for_another() -> None:
    samples, reader = recorded(cached=True)
    assert samples[1] is samples[1] is samples[-3]
    assert reader.calls == ["i1"]
    rest = samples[2:]
    assert rest.cached and [sample.image_id for sample in rest] == ["i2", "i3"]
    assert samples.with_ground_truth()[1] is not samples[1]
    with pytest.raises(IndexError):
        samples[4]


def test_ground_truth_and_saliency_need_every_image() -> None:
    samples = make_samples(3)
    bare = dataclasses.replace(samples.files[1], mask=None, saliency=None)
    some = dataclasses.replace(samples, files=(samples.files[0], bare, samples.files[2]))
    assert samples.has_ground_truth and samples.has_saliency
    assert not some.has_ground_truth and not some.has_saliency and some[2:].has_ground_truth
    assert some.annotated.image_ids == ["image0", "image2"] and some.examples(2)[1].mask is not None
    with pytest.raises(DataError, match="'train' has images without ground truth; set data.masks"):
        some.with_ground_truth()
