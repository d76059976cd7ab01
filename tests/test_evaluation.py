"""Stage 7: numbers worked out by hand, and the threshold sweep against the plain way."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import generator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from smaflib.config import EvaluationConfig
from smaflib.evaluation import (
    SegmentationMetrics,
    compare_masks,
    confusion_matrix,
    evaluate,
    image_score,
    intersection_over_union,
    masks_of,
    object_scores,
    sweep_thresholds,
)

SEEDS = st.integers(0, 2**20)


def labels(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.uint8)


def random_pair(seed: int, num_classes: int = 3, void: bool = True) -> tuple[Tensor, Tensor]:
    """A mask and a ground truth (6, 7) that agree in about half of the pixels."""
    source = generator(seed)
    ground_truth = torch.randint(0, num_classes + 1, (6, 7), dtype=torch.uint8, generator=source)
    other = torch.randint(0, num_classes + 1, (6, 7), dtype=torch.uint8, generator=source)
    mask = torch.where(torch.rand(6, 7, generator=source) < 0.5, ground_truth, other)
    if void:
        ground_truth[torch.rand(6, 7, generator=source) < 0.2] = 255
    return mask, ground_truth


# --- confusion matrix and IoU -----------------------------------------------------------------------------------------


def test_iou_by_hand_and_absent_class_has_none() -> None:
    confusion = torch.tensor([[3, 1, 0], [2, 2, 0], [0, 0, 0]])
    iou = intersection_over_union(confusion)
    assert iou[:2].tolist() == pytest.approx([3 / 6, 2 / 5]) and math.isnan(iou[2])
    scores = SegmentationMetrics(confusion, torch.zeros(3, 2, 3), ("cat", "dog"))
    assert scores.miou == pytest.approx(0.45)  # not 0.3, not 0.633
    assert math.isnan(SegmentationMetrics(confusion * 0, torch.zeros(3, 2, 3), ("cat", "dog")).miou)


def test_masks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"mask \(1, 2\) and ground truth \(1, 3\) must have the same size"):
        confusion_matrix(labels([0, 1]), labels([0, 1, 1]), 1)
    with pytest.raises(ValueError, match="mask holds label 5, but there are 4 classes"):
        confusion_matrix(labels([0, 5]), labels([0, 1]), 4)
    with pytest.raises(ValueError, match="ground truth holds label 5, but there are 4 classes"):
        confusion_matrix(labels([0, 1, 1]), labels([0, 5, 255]), 4)
    with pytest.raises(ValueError, match="ground truth holds label 5, but there are 4 classes"):
        sweep_thresholds([torch.rand(4, 1, 3)], [labels([0, 5, 255])], "abcd")


# --- a whole split ----------------------------------------------------------------------------------------------------


def test_split_is_counted_as_one_histogram_and_not_as_a_mean_of_images() -> None:
    masks, ground_truths = [labels([1, 1, 1, 1]), labels([0, 0])], [labels([1, 1, 1, 0]), labels([1, 0])]
    scores = evaluate(masks, ground_truths, ["cat"])
    assert scores.confusion.tolist() == [[1, 1], [1, 3]]
    assert scores.iou.tolist() == pytest.approx([1 / 3, 3 / 5]) and scores.miou == pytest.approx(7 / 15)
    assert scores.precision.tolist() == pytest.approx([1 / 2, 3 / 4])
    assert scores.recall.tolist() == pytest.approx([1 / 2, 3 / 4])


def test_image_score_counts_the_labels_that_occur() -> None:
    # Background 2 of 3, class 1 hit 1 of 2; classes 2 and 3 do not occur.
    assert image_score(labels([0, 0, 0, 1]), labels([0, 0, 1, 1]), 3) == pytest.approx((2 / 3 + 1 / 2) / 2)


# --- object sizes -----------------------------------------------------------------------------------------------------


def test_sizes_by_hand_with_void_and_false_alarms() -> None:
    # 20 pixels, 2 of them void; cat has 2 (a tenth), dog 10 (half).
    ground_truth, mask = torch.zeros(20, dtype=torch.uint8), torch.zeros(20, dtype=torch.uint8)
    ground_truth[0:2], ground_truth[2:12], ground_truth[18:] = 1, 2, 255
    mask[1:4], mask[4:9], mask[17], mask[18:] = 1, 2, 3, 1  # cat: a hit, 2 alarms; dog: 5 hits; cow is not there
    scores = evaluate([mask.view(4, 5)], [ground_truth.view(4, 5)], ["cat", "dog", "cow"])
    assert scores.by_size[1, 0].tolist() == [1, 2, 1]  # medium: hits, false alarms, misses
    assert scores.by_size[2, 1].tolist() == [5, 0, 5]  # large
    assert int(scores.by_size.sum()) == 14  # cow's alarm has no size
    assert float(scores.iou_of_size("medium")[0]) == 0.25 and float(scores.iou_of_size("large")[1]) == 0.5
    assert scores.confusion[0].tolist() == [5, 0, 0, 1]


# --- records ----------------------------------------------------------------------------------------------------------


def test_records_are_tidy_and_complete() -> None:
    scores = evaluate([labels([1, 0, 0, 0])], [labels([1, 0, 0, 0])], ["cat", "dog"])
    records = scores.records(stage="pseudo_masks", scale=None)
    assert all(record["stage"] == "pseudo_masks" and record["scale"] is None for record in records)
    found = {(r["metric"], r["class_name"], r.get("object_size")): r["value"] for r in records}
    assert len(found) == len(records) == 3 * 4 + 3
    assert found["iou", "mean", None] == found["iou", "background", None] == found["precision", "cat", None] == 1
    assert math.isnan(found["iou", "dog", None]) and math.isnan(found["iou", "mean", "small"])
    assert found["iou", "mean", "large"] == 1


# --- maps and thresholds ----------------------------------------------------------------------------------------------


def random_maps(seed: int, num_classes: int, num_images: int = 2) -> tuple[list[Tensor], list[Tensor]]:
    """Maps with values in steps of 0.05, so that thresholds are met exactly, and absent classes."""
    source = generator(seed)
    denoised, ground_truths = [], []
    for index in range(num_images):
        maps = torch.randint(0, 21, (num_classes, 6, 7), generator=source) / 20
        maps[int(torch.randint(0, num_classes, (), generator=source))] = 0
        denoised.append(maps)
        ground_truths.append(random_pair(seed + index, num_classes)[1])
    return denoised, ground_truths


def equal_scores(one: SegmentationMetrics, other: SegmentationMetrics) -> bool:
    same = torch.equal(one.confusion, other.confusion) and torch.equal(one.by_size, other.by_size)
    return same and one.class_names == other.class_names


@settings(max_examples=20)
@given(
    seed=SEEDS,
    num_classes=st.integers(1, 4),
    thresholds=st.lists(st.integers(0, 20).map(lambda step: step / 20), min_size=1, max_size=5),
)
def test_sweep_is_evaluation_at_every_threshold(seed: int, num_classes: int, thresholds: list[float]) -> None:
    denoised, ground_truths = random_maps(seed, num_classes)
    names = "abcd"[:num_classes]
    config = EvaluationConfig(thresholds=tuple(thresholds), size_limits=(0.1, 0.2))
    sweep = sweep_thresholds(denoised, ground_truths, names, config)
    assert set(sweep) == set(thresholds)
    for threshold, scores in sweep.items():
        assert equal_scores(scores, evaluate(masks_of(denoised, threshold), ground_truths, names, config))


@settings(max_examples=15, deadline=None)
@given(num_classes=st.integers(1, 25), seed=st.integers(0, 10_000))
def test_confusion_matrix_is_torchmetrics(num_classes: int, seed: int) -> None:
    source = generator(seed)
    mask = torch.randint(0, num_classes + 1, (9, 7), dtype=torch.uint8, generator=source)
    ground_truth = torch.randint(0, num_classes + 1, (9, 7), dtype=torch.uint8, generator=source)
    ground_truth[torch.rand(9, 7, generator=source) < 0.2] = 255
    expected = multiclass_confusion_matrix(mask.long(), ground_truth.long(), num_classes + 1, ignore_index=255)
    assert torch.equal(confusion_matrix(mask, ground_truth, num_classes), expected)


def test_objects_one_by_one_by_hand() -> None:
    # Image 0: class 1 on two of four pixels, one of them found, and one false alarm. Image 1: class 2 found, one void.
    denoised = [
        torch.tensor([[[0.9, 0.0, 0.9, 0.0]], [[0.0] * 4]]),
        torch.tensor([[[0.0] * 4], [[0.8, 0.8, 0.0, 0.0]]]),
    ]
    ground_truths = [torch.tensor([[1, 1, 0, 0]], dtype=torch.uint8), torch.tensor([[2, 255, 0, 0]], dtype=torch.uint8)]
    assert object_scores(denoised, ground_truths, ("a", "b"), bg_score=0.5) == [
        {"image": 0, "class_number": 0, "share": 0.5, "iou": pytest.approx(1 / 3)},
        {"image": 1, "class_number": 1, "share": 0.25, "iou": 1.0},
    ]


def test_masks_are_compared_pixel_by_pixel_without_void() -> None:
    ground_truth = torch.tensor([[1, 1, 0, 0, 255]], dtype=torch.uint8)
    before = torch.tensor([[1, 0, 0, 1, 1]], dtype=torch.uint8)
    after = torch.tensor([[1, 1, 2, 2, 0]], dtype=torch.uint8)
    assert compare_masks(before, after, ground_truth) == {"both right": 1, "gained": 1, "lost": 1, "both wrong": 1}
