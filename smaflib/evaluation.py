"""Stage 7: scores of masks over all pixels, per class and per object size. The only stage that needs ground truth."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smaflib.config import EvaluationConfig
from smaflib.data.classes import VOID_LABEL
from smaflib.data.masks import strongest
from smaflib.maps import FusedMaps
from smaflib.reactivation import hard_labels, reactivate

SIZES = ("small", "medium", "large")


def confusion_matrix(mask: Tensor, ground_truth: Tensor, num_classes: int) -> Tensor:
    """Count pixels by true and predicted label, without the void pixels of the ground truth.

    From a mask, uint8 (H, W) in [0, K], and a ground truth, which may also hold 255, to int64 (K+1, K+1), whose rows
    are the ground truth. ValueError if the sizes differ or a label is above K.

    Example:
        >>> mask, truth = torch.tensor([[[0, 1, 1]], [[0, 1, 255]]], dtype=torch.uint8)
        >>> confusion_matrix(mask, truth, num_classes=1).tolist()
        [[1, 0], [0, 1]]
    """
    if mask.shape != ground_truth.shape:
        shapes = f"mask {tuple(mask.shape)} and ground truth {tuple(ground_truth.shape)}"
        raise ValueError(f"{shapes} must have the same size")
    _refuse_labels_above(num_classes, "mask", mask)
    _refuse_labels_above(num_classes, "ground truth", ground_truth.where(ground_truth != VOID_LABEL, 0))
    side = num_classes + 1
    # Void pixels get a separate row, which is cheaper than selecting the others.
    cells = ground_truth.int() * side + mask
    counts = torch.bincount(cells.flatten(), minlength=(VOID_LABEL + 1) * side)
    return counts[: side * side].view(side, side)


def _refuse_labels_above(num_classes: int, what: str, labels: Tensor) -> None:
    if labels.numel() and int(labels.max()) > num_classes:
        raise ValueError(f"the {what} holds label {int(labels.max())}, but there are {num_classes} classes")


def intersection_over_union(confusion: Tensor) -> Tensor:
    """(K+1, K+1) counts to (K+1,) IoU in [0, 1]; nan for a class absent from ground truth and prediction.

    Example:
        >>> intersection_over_union(torch.tensor([[6, 2], [0, 2]])).tolist()
        [0.75, 0.5]
    """
    hits = confusion.diagonal().double()
    return hits / (confusion.sum(dim=0) + confusion.sum(dim=1) - hits)


@dataclass(frozen=True)
class SegmentationMetrics:
    """Pixel counts over a split.

    An object is all that an image shows of one class. False positives of a class that is absent from the image have no
    size and count in ``confusion`` only.
    """

    confusion: Tensor  # int64 (K+1, K+1), rows are the ground truth
    by_size: Tensor  # int64 (3, K, 3): by size and foreground class true positives, false positives, false negatives
    class_names: tuple[str, ...]  # the K foreground classes

    @property
    def iou(self) -> Tensor:
        """(K+1,) in [0, 1], background first."""
        return intersection_over_union(self.confusion)

    @property
    def miou(self) -> float:
        """Mean IoU over the background and the classes that have one; nan if none has."""
        return float(self.iou.nanmean())

    @property
    def precision(self) -> Tensor:
        """(K+1,): true positives / predicted pixels."""
        return self.confusion.diagonal().double() / self.confusion.sum(dim=0)

    @property
    def recall(self) -> Tensor:
        """(K+1,): true positives / true pixels."""
        return self.confusion.diagonal().double() / self.confusion.sum(dim=1)

    def iou_of_size(self, size: str) -> Tensor:
        """(K,) IoU of the objects of one size; nan for a class without any."""
        hits, alarms, misses = self.by_size[SIZES.index(size)].double().unbind(dim=1)
        return hits / (hits + alarms + misses)

    def records(self, **where: Any) -> list[dict[str, Any]]:
        """Tidy records with the fields ``where``: IoU, precision, recall by class and their means, mean IoU by size."""
        records = []
        for metric, values in (("iou", self.iou), ("precision", self.precision), ("recall", self.recall)):
            records.append(where | {"metric": metric, "class_name": "mean", "value": float(values.nanmean())})
            for name, value in zip(("background", *self.class_names), values.tolist(), strict=True):
                records.append(where | {"metric": metric, "class_name": name, "value": value})
        for size in SIZES:
            value = float(self.iou_of_size(size).nanmean())
            records.append(where | {"metric": "iou", "class_name": "mean", "object_size": size, "value": value})
        return records


def evaluate(
    masks: Iterable[Tensor],
    ground_truths: Iterable[Tensor],
    class_names: Sequence[str],
    config: EvaluationConfig | None = None,
) -> SegmentationMetrics:
    """Compare the masks of a whole split, uint8 (H, W) each, with its ground truth, where 255 is void.

    Example:
        >>> mask, truth = torch.tensor([[[0, 1], [0, 1]], [[0, 1], [1, 1]]], dtype=torch.uint8)
        >>> f"{evaluate([mask], [truth], ['cat']).miou:.3f}"  # the mean of 1/2 and 2/3
        '0.583'
    """
    pairs = zip(masks, ground_truths, strict=True)
    counts = ((confusion_matrix(mask, truth, len(class_names))[None], truth.numel()) for mask, truth in pairs)
    return _add_up(counts, 1, class_names, config or EvaluationConfig())[0]


def _add_up(
    images: Iterable[tuple[Tensor, int]], num: int, class_names: Sequence[str], config: EvaluationConfig
) -> list[SegmentationMetrics]:
    """Scores of ``num`` masks per image, from the counts (num, K+1, K+1) of each image and its number of pixels."""
    num_labels, limits = len(class_names) + 1, torch.tensor(config.size_limits)
    confusion = torch.zeros(num, num_labels, num_labels, dtype=torch.int64)
    by_size = torch.zeros(num, len(SIZES), num_labels - 1, 3, dtype=torch.int64)
    for counts, num_pixels in images:
        confusion += counts
        hits, area = counts.diagonal(dim1=1, dim2=2)[:, 1:], counts.sum(dim=2)[:, 1:]  # (num, K)
        alarms = counts.sum(dim=1)[:, 1:] - hits
        shown = area[0].nonzero()[:, 0]
        size = torch.bucketize(area[0, shown] / num_pixels, limits, right=True)
        by_size[:, size, shown] += torch.stack([hits, alarms, area - hits], dim=-1)[:, shown]
    return [SegmentationMetrics(*each, tuple(class_names)) for each in zip(confusion, by_size, strict=True)]


def sweep_thresholds(
    denoised: Sequence[Tensor],
    ground_truths: Sequence[Tensor],
    class_names: Sequence[str],
    config: EvaluationConfig | None = None,
) -> dict[float, SegmentationMetrics]:
    """Scores of attention maps at every background threshold in ``config.thresholds``, in rising order.

    Both sequences may be lazy: per image (K, H, W) in [0, 1], and uint8 (H, W) where 255 is void.
    """
    config = config or EvaluationConfig()
    rising = sorted(set(config.thresholds))  # searchsorted needs the order
    num_labels, thresholds, steps = len(class_names) + 1, torch.tensor(rising), len(rising)

    def count(index: int) -> tuple[Tensor, int]:
        (score, winner), ground_truth = _strongest(denoised, index), ground_truths[index]
        void = ground_truth == VOID_LABEL
        _refuse_labels_above(num_labels - 1, "ground truth", ground_truth.where(~void, 0))
        # One histogram over (ground truth, best class, number of thresholds below its score) holds the confusion
        # matrices of all thresholds.
        exceeded = torch.searchsorted(thresholds, score.contiguous())
        cell = (ground_truth.long() * num_labels + winner + 1) * (steps + 1) + exceeded
        size = num_labels * num_labels * (steps + 1)
        cell = cell.where(~void, size)  # a last cell, which is cheaper than selecting the others
        histogram = torch.bincount(cell.flatten(), minlength=size + 1)[:size].view(num_labels, num_labels, steps + 1)
        found = histogram.flip(2).cumsum(dim=2).flip(2)[..., 1:].permute(2, 0, 1).clone()  # (T, ground truth, class)
        found[:, :, 0] = histogram.sum(dim=(1, 2)) - found.sum(dim=2)  # the other pixels of each true label
        return found, ground_truth.numel()

    if len(denoised) != len(ground_truths):
        raise ValueError(f"there are maps of {len(denoised)} images and {len(ground_truths)} ground truths")
    # Images in parallel, one torch thread each: torch's own threads lose more than they gain on a single image.
    with ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = _add_up(pool.map(count, range(len(denoised))), steps, class_names, config)
    return dict(zip(rising, found, strict=True))


def _strongest(denoised: Sequence[Tensor], index: int) -> tuple[Tensor, Tensor]:
    """The highest score (H, W) of each pixel of an image and its class (H, W)."""
    if isinstance(denoised, FusedMaps):  # of the classes in the image only
        return denoised.strongest(index)
    return strongest(denoised[index])


def masks_of(denoised: Sequence[Tensor], bg_score: float) -> Iterator[Tensor]:
    """Masks of attention maps without refinement: uint8 (H, W) each, as :func:`~smaflib.reactivation.hard_labels`."""
    for score, winner in (_strongest(denoised, index) for index in range(len(denoised))):
        yield ((winner + 1) * (score > bg_score)).to(torch.uint8)


def image_score(mask: Tensor, ground_truth: Tensor, num_classes: int) -> float:
    """Mean IoU of one image over the labels in its mask and ground truth, in [0, 1]."""
    return float(intersection_over_union(confusion_matrix(mask, ground_truth, num_classes)).nanmean())


def object_scores(
    denoised: Iterable[Tensor], ground_truths: Iterable[Tensor], class_names: Sequence[str], bg_score: float
) -> list[dict[str, Any]]:
    """IoU of every object in maps as in :func:`sweep_thresholds`; an object is all that an image shows of one class.

    Returns:
        Per object ``image`` (index), ``class_number`` (0 to K-1), ``share`` of the image's area in (0, 1], ``iou``.

    Example:
        >>> maps, truth = torch.tensor([[[0.5, 0.125]]]), torch.tensor([[1, 1]], dtype=torch.uint8)
        >>> object_scores([maps], [truth], ["cat"], bg_score=0.25)
        [{'image': 0, 'class_number': 0, 'share': 1.0, 'iou': 0.5}]
    """
    objects = []
    for image, (maps, ground_truth) in enumerate(zip(denoised, ground_truths, strict=True)):
        confusion = confusion_matrix(hard_labels(maps, bg_score), ground_truth, len(class_names))
        iou, area = intersection_over_union(confusion), confusion.sum(dim=1)
        for label in area[1:].nonzero()[:, 0].tolist():
            share = int(area[label + 1]) / ground_truth.numel()
            objects.append({"image": image, "class_number": label, "share": share, "iou": float(iou[label + 1])})
    return objects


def compare_masks(before: Tensor, after: Tensor, ground_truth: Tensor) -> dict[str, int]:
    """Count the pixels that two masks, uint8 (H, W), label correctly: ``gained`` if only ``after`` does.

    Void pixels do not count.

    Example:
        >>> before, after, truth = torch.tensor([[[0, 1, 1]], [[1, 1, 0]], [[1, 1, 255]]], dtype=torch.uint8)
        >>> compare_masks(before, after, truth)
        {'both right': 1, 'gained': 1, 'lost': 0, 'both wrong': 0}
    """
    counted = ground_truth != VOID_LABEL
    was, now = (before == ground_truth)[counted], (after == ground_truth)[counted]
    parts = {"both right": was & now, "gained": ~was & now, "lost": was & ~now, "both wrong": ~was & ~now}
    return {name: int(part.sum()) for name, part in parts.items()}


def score_on_objects(
    denoised: Iterable[Tensor], ground_truths: Iterable[Tensor], bg_score: float
) -> dict[tuple[str, str], float]:
    """Mean scores in [0, 1], before and after reactivation, of maps as in :func:`sweep_thresholds`.

    By ("denoised" or "reactivated", "score on objects" or "score on background"): the mean score of the true class on
    objects, of the best class on background.
    """
    sums = {(step, place): [0.0, 0] for step in ("denoised", "reactivated") for place in ("objects", "background")}
    for maps, ground_truth in zip(denoised, ground_truths, strict=True):
        objects, background = (ground_truth > 0) & (ground_truth != VOID_LABEL), ground_truth == 0
        index = (ground_truth.long() - 1).clamp(0, len(maps) - 1)
        for step, scores in (("denoised", maps), ("reactivated", reactivate(maps, bg_score)[1:])):
            of_truth = scores.gather(0, index[None])[0]
            for place, pixels in (("objects", of_truth[objects]), ("background", scores.amax(dim=0)[background])):
                sums[step, place][0] += float(pixels.sum())
                sums[step, place][1] += pixels.numel()
    return {(step, f"score on {place}"): total / max(1, n) for (step, place), (total, n) in sums.items()}
