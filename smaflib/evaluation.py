"""Stage 7: how good masks are, over all pixels, per class and object size; the only stage that needs ground truth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from smaflib.config import EvaluationConfig
from smaflib.data.classes import VOID_LABEL
from smaflib.maps import DenoisedMaps
from smaflib.reactivation import hard_labels, reactivate
from smaflib.runtime import ahead

SIZES = ("small", "medium", "large")


def confusion_matrix(mask: Tensor, ground_truth: Tensor, num_classes: int) -> Tensor:
    """Count pixels by true and predicted label; void pixels of the ground truth count nowhere.

    Args:
        mask: uint8 (H, W) in [0, K].
        ground_truth: uint8 (H, W) in [0, K] or 255.
        num_classes: K.

    Returns:
        int64 (K+1, K+1), rows are the ground truth.

    Raises:
        ValueError: if the sizes differ or labels above K occur.

    Example:
        >>> mask, truth = torch.tensor([[[0, 1, 1]], [[0, 1, 255]]], dtype=torch.uint8)
        >>> confusion_matrix(mask, truth, num_classes=1).tolist()
        [[1, 0], [0, 1]]
    """
    if mask.shape != ground_truth.shape:
        raise ValueError(f"mask {tuple(mask.shape)} and ground truth {tuple(ground_truth.shape)} must have one size")
    _refuse_labels_above(num_classes, "mask", mask, void=False)
    _refuse_labels_above(num_classes, "ground truth", ground_truth)
    side = num_classes + 1
    # Void pixels are counted in a row of their own, which is cheaper than to pick the others out.
    cells = ground_truth.int() * side + mask
    counts = torch.bincount(cells.flatten(), minlength=(VOID_LABEL + 1) * side)
    return counts[: side * side].view(side, side)


def _refuse_labels_above(num_classes: int, what: str, labels: Tensor, void: bool = True) -> None:
    known = labels.where(labels != VOID_LABEL, 0) if void else labels
    if known.numel() and int(known.max()) > num_classes:
        raise ValueError(f"the {what} holds label {int(known.max())}, but there are {num_classes} classes")


def intersection_over_union(confusion: Tensor) -> Tensor:
    """(K+1, K+1) counts to (K+1,) IoU in [0, 1]; nan for a class absent from ground truth and prediction.

    Example:
        >>> intersection_over_union(torch.tensor([[6, 2], [0, 2]])).tolist()
        [0.75, 0.5]
    """
    hits = confusion.diagonal().double()
    return hits / (confusion.sum(dim=0) + confusion.sum(dim=1) - hits)


def mean_over_classes(values: Tensor) -> float:
    """Mean over the classes that have a value; nan if none has.

    Example:
        >>> mean_over_classes(torch.tensor([0.75, float("nan"), 0.5]))
        0.625
    """
    return float(values.nanmean())


@dataclass(frozen=True)
class SegmentationMetrics:
    """What was counted over a split.

    Attributes:
        confusion: int64 (K+1, K+1), rows are the ground truth, over all pixels.
        by_size: int64 (3, K, 3): for small, medium and large, per foreground class, hits, false alarms and misses.
            An object is what an image shows of one class; all its counts go to its size. False alarms of classes
            that an image does not show have no size and count in ``confusion`` only.
        class_names: the K foreground classes.
    """

    confusion: Tensor
    by_size: Tensor
    class_names: tuple[str, ...]

    @property
    def iou(self) -> Tensor:
        """(K+1,) in [0, 1], background first."""
        return intersection_over_union(self.confusion)

    @property
    def miou(self) -> float:
        """Mean IoU over background and classes."""
        return mean_over_classes(self.iou)

    @property
    def precision(self) -> Tensor:
        """(K+1,): share of the pixels given a label that have it."""
        return self.confusion.diagonal().double() / self.confusion.sum(dim=0)

    @property
    def recall(self) -> Tensor:
        """(K+1,): share of the pixels of a label that were given it."""
        return self.confusion.diagonal().double() / self.confusion.sum(dim=1)

    def iou_of_size(self, size: str) -> Tensor:
        """(K,) IoU of the objects of one size; nan for a class that has none."""
        hits, alarms, misses = self.by_size[SIZES.index(size)].double().unbind(dim=1)
        return hits / (hits + alarms + misses)

    def records(self, **where: Any) -> list[dict[str, Any]]:
        """Tidy records for ``metrics.json``: mean and per class IoU, precision and recall, mean IoU per object size.

        Args:
            where: fields that all records share: stage, variant, split, scale, bg_score.
        """
        records = []
        for metric, values in (("iou", self.iou), ("precision", self.precision), ("recall", self.recall)):
            records.append(where | {"metric": metric, "class_name": "mean", "value": mean_over_classes(values)})
            for name, value in zip(("background", *self.class_names), values.tolist(), strict=True):
                records.append(where | {"metric": metric, "class_name": name, "value": value})
        for size in SIZES:
            value = mean_over_classes(self.iou_of_size(size))
            records.append(where | {"metric": "iou", "class_name": "mean", "object_size": size, "value": value})
        return records


def evaluate(
    masks: Iterable[Tensor],
    ground_truths: Iterable[Tensor],
    class_names: Sequence[str],
    config: EvaluationConfig | None = None,
) -> SegmentationMetrics:
    """Compare masks with the ground truth over a whole split.

    Args:
        masks: per image uint8 (H, W).
        ground_truths: per image uint8 (H, W), 255 is void.
        class_names: the K foreground classes.
        config: the limits between object sizes.

    Example:
        >>> mask, truth = torch.tensor([[[0, 1], [0, 1]], [[0, 1], [1, 1]]], dtype=torch.uint8)
        >>> f"{evaluate([mask], [truth], ['cat']).miou:.3f}"  # the mean of 1/2 and 2/3
        '0.583'
    """
    config = config or EvaluationConfig()
    num_classes = len(class_names)
    confusion = torch.zeros(num_classes + 1, num_classes + 1, dtype=torch.int64)
    by_size = torch.zeros(len(SIZES), num_classes, 3, dtype=torch.int64)
    for mask, ground_truth in zip(masks, ground_truths, strict=True):
        counts = confusion_matrix(mask, ground_truth, num_classes)
        confusion += counts
        add_by_size(by_size, counts[None], ground_truth.numel(), config)
    return SegmentationMetrics(confusion, by_size, tuple(class_names))


def add_by_size(by_size: Tensor, counts: Tensor, num_pixels: int, config: EvaluationConfig) -> None:
    """Add one image's counts to the size of each of its objects.

    Args:
        by_size: (3, K, 3) or (T, 3, K, 3), changed in place.
        counts: (T, K+1, K+1) confusion matrices of the image against the same ground truth.
        num_pixels: of the image, void included.
        config: the limits between object sizes.
    """
    target = by_size if by_size.dim() == 4 else by_size[None]
    hits = counts.diagonal(dim1=1, dim2=2)[:, 1:]  # (T, K)
    area = counts.sum(dim=2)[:, 1:]
    alarms = counts.sum(dim=1)[:, 1:] - hits
    kinds = torch.stack([hits, alarms, area - hits], dim=-1)  # (T, K, 3)
    share = area[0] / num_pixels
    small, large = config.size_limits
    for index, chosen in enumerate((share < small, (share >= small) & (share < large), share >= large)):
        target[:, index] += kinds * (chosen & (area[0] > 0))[:, None]


def sweep_thresholds(
    denoised: Iterable[Tensor],
    ground_truths: Iterable[Tensor],
    class_names: Sequence[str],
    config: EvaluationConfig | None = None,
) -> dict[float, SegmentationMetrics]:
    """Scores of attention maps for every background score in ``config.thresholds``.

    Args:
        denoised: per image (K, H, W) in [0, 1].
        ground_truths: per image uint8 (H, W), 255 is void.
        class_names: the K foreground classes.
        config: thresholds and the limits between object sizes.
    """
    config = config or EvaluationConfig()
    rising = sorted(set(config.thresholds))  # searchsorted needs the order
    num_labels, thresholds, steps = len(class_names) + 1, torch.tensor(rising), len(rising)
    confusion = torch.zeros(steps, num_labels, num_labels, dtype=torch.int64)
    by_size = torch.zeros(steps, len(SIZES), num_labels - 1, 3, dtype=torch.int64)

    def count(image: tuple[Strongest, Callable[[], Tensor]]) -> tuple[Tensor, int]:
        # One histogram over (ground truth, strongest class, how many thresholds it exceeds) holds every threshold's
        # matrix.
        strongest, read_ground_truth = image
        (score, winner), ground_truth = strongest(), read_ground_truth()
        _refuse_labels_above(num_labels - 1, "ground truth", ground_truth)
        exceeded = torch.searchsorted(thresholds, score.contiguous())  # strictly below the score
        cell = (ground_truth.long() * num_labels + winner + 1) * (steps + 1) + exceeded
        size = num_labels * num_labels * (steps + 1)
        cell = cell.where(ground_truth != VOID_LABEL, size)  # void has a cell of its own, behind the others
        histogram = torch.bincount(cell.flatten(), minlength=size + 1)[:size].view(num_labels, num_labels, steps + 1)
        total = histogram.sum(dim=(1, 2))  # (K+1,) pixels of each true label
        found = histogram.flip(2).cumsum(dim=2).flip(2)[..., 1:].permute(2, 0, 1).clone()  # (T, ground truth, class)
        found[:, :, 0] = total - found.sum(dim=2)
        return found, ground_truth.numel()

    for found, num_pixels in ahead(count, zip(_strongest(denoised), _when_asked(ground_truths), strict=True)):
        confusion += found
        add_by_size(by_size, found, num_pixels, config)
    names = tuple(class_names)
    return {t: SegmentationMetrics(confusion[i], by_size[i], names) for i, t in enumerate(rising)}


Strongest = Callable[[], tuple[Tensor, Tensor]]
"""Gives per pixel the highest score (H, W) and its class (H, W), when it is called."""


def _strongest(denoised: Iterable[Tensor]) -> Iterator[Strongest]:
    """Per image, at the cost of the classes that it shows where the maps know them."""
    if isinstance(denoised, DenoisedMaps):
        yield from (partial(_strongest_present, denoised, index) for index in range(len(denoised)))
    else:
        yield from (partial(_strongest_of, read) for read in _when_asked(denoised))


def _strongest_present(denoised: DenoisedMaps, index: int) -> tuple[Tensor, Tensor]:
    return denoised.present(index).strongest()


def _strongest_of(read: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    score, winner = read().max(dim=0)
    return score, winner


def _when_asked(items: Iterable[Tensor]) -> Iterator[Callable[[], Tensor]]:
    """Items of a sequence are read by whoever calls, in a thread as a rule; others as they come."""
    if isinstance(items, Sequence):
        yield from (partial(items.__getitem__, index) for index in range(len(items)))
    else:
        yield from (partial(_itself, item) for item in items)


def _itself(item: Tensor) -> Tensor:
    return item


def best_threshold(sweep: dict[float, SegmentationMetrics]) -> float:
    """The oracle threshold, the background score with the highest mIoU: choose it on one split, report on another."""
    return max(sweep, key=lambda threshold: sweep[threshold].miou)


def masks_of(denoised: Iterable[Tensor], bg_score: float) -> Iterable[Tensor]:
    """Unrefined masks of attention maps: uint8 (H, W) each, as of :func:`~smaflib.reactivation.hard_labels`."""

    def mask(strongest: Strongest) -> Tensor:
        score, winner = strongest()
        return ((winner + 1) * (score > bg_score)).to(torch.uint8)

    return ahead(mask, _strongest(denoised))


def evaluate_maps(
    denoised: Iterable[Tensor],
    ground_truths: Iterable[Tensor] | None,
    class_names: Sequence[str],
    config: EvaluationConfig,
    bg_score: float | None = None,
    **where: Any,
) -> tuple[list[dict[str, Any]], float | None]:
    """Evaluate attention maps, at a given background score or at their oracle threshold, the best one for them.

    Args:
        denoised: per image (K, H, W) in [0, 1].
        ground_truths: per image uint8 (H, W); None where the data has none: then there are no records.
        class_names: the K foreground classes.
        config: thresholds and the limits between object sizes.
        bg_score: None chooses the oracle threshold of this split; give it to evaluate another split.
        where: fields of the records: variant, split, scale.

    Returns:
        Tidy records, with ``iou_sweep`` for every threshold, and the background score of the evaluation.
    """
    if ground_truths is None:
        return [], None
    if bg_score is not None:
        config = config.model_copy(update={"thresholds": (*config.thresholds, bg_score)})
    sweep = sweep_thresholds(denoised, ground_truths, class_names, config)
    chosen = best_threshold(sweep) if bg_score is None else bg_score
    records = sweep[chosen].records(bg_score=chosen, **where)
    for threshold, scores in sweep.items():
        records.append(
            where | {"metric": "iou_sweep", "class_name": "mean", "bg_score": threshold, "value": scores.miou}
        )
    return records, chosen


def image_score(mask: Tensor, ground_truth: Tensor, num_classes: int) -> float:
    """Mean IoU of one image over the labels that occur in it, to find the best and the worst cases; in [0, 1].

    Example:
        >>> mask, truth = torch.tensor([[[0, 1], [0, 1]], [[0, 1], [1, 1]]], dtype=torch.uint8)
        >>> f"{image_score(mask, truth, num_classes=1):.3f}"
        '0.583'
    """
    return mean_over_classes(intersection_over_union(confusion_matrix(mask, ground_truth, num_classes)))


def object_scores(
    denoised: Iterable[Tensor], ground_truths: Iterable[Tensor], class_names: Sequence[str], bg_score: float
) -> list[dict[str, Any]]:
    """IoU of every object by itself: all that an image shows of one class.

    Args:
        denoised: per image (K, H, W) in [0, 1].
        ground_truths: per image uint8 (H, W), 255 is void.
        class_names: the K foreground classes.
        bg_score: the background's score.

    Returns:
        Per object ``image`` (its number in the sequence), ``class_number`` (0 to K-1), ``share`` of the image's area in
        (0, 1], ``iou`` in [0, 1].

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
    """Pixels that one mask has right and another wrong, void left out.

    Args:
        before: uint8 (H, W).
        after: uint8 (H, W).
        ground_truth: uint8 (H, W), 255 is void.

    Returns:
        Counts of pixels: ``both right``, ``gained`` (only ``after`` is right), ``lost`` (only ``before`` is right),
        ``both wrong``.

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
    """How sure maps are of the right class, before and after reactivation.

    Args:
        denoised: per image (K, H, W) in [0, 1].
        ground_truths: per image uint8 (H, W), 255 is void.
        bg_score: the background's score in the reactivation.

    Returns:
        By ("denoised" or "reactivated", "score on objects" or "score on background"): on objects the mean score of
        the true class, on background the mean score of the strongest class; both in [0, 1].
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
