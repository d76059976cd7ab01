"""Before hours are spent on a data set: make it, where code makes it, and say in numbers what it holds."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from smaflib.config import Config, EvaluationConfig
from smaflib.data.classes import VOID_LABEL
from smaflib.data.coco import coco_masks_folder, write_coco_masks
from smaflib.data.sample import Samples
from smaflib.data.voc import SPLITS
from smaflib.runtime import num_cores, progress


def make_data(config: Config, run_folder: Path) -> None:
    """Make what is not there yet: the mini data set, or COCO's masks, for evaluation; other data is left alone.

    The mini set is drawn at ``data.root`` or in the run folder, COCO's masks are painted into the run folder unless
    ``data.masks`` names a folder of them.
    """
    data = config.data
    if data.kind == "coco" and data.masks is None:
        for split in SPLITS:
            write_coco_masks(data, split, coco_masks_folder(data, split, run_folder))
    root = data.root or run_folder / "data"
    if data.kind == "mini" and not (root.is_dir() and any(root.iterdir())):
        from minidata import make_mini  # minidata imports this package

        make_mini(
            root,
            data.num_train,
            data.num_val,
            size=data.image_size,
            seed=config.seed,
            # Starting a worker costs as much as drawing a hundred images.
            num_workers=num_cores() if data.num_train + data.num_val >= 300 else 1,
            progress=progress,
        )


def summarize(samples: Samples, config: EvaluationConfig) -> dict[str, Any]:
    """Count images and labels; with ground truth also object sizes, and how good the saliency maps are.

    Args:
        samples: a split.
        config: the limits between object sizes.

    Returns:
        ``images``, ``labels_per_image``, ``images_per_class``, ``labels_sha256`` (of ids and labels), and with ground
        truth ``object_shares`` (share of the image's area, of all objects) and ``saliency`` (iou, precision, recall of
        the maps above 0.5 against the foreground; left out where nothing is above 0.5 or in the foreground).
    """
    labels = samples.image_labels
    listing = "\n".join(f"{files.image_id}:{files.labels}" for files in samples.files)
    facts: dict[str, Any] = {
        "images": len(samples),
        "labels_per_image": float(labels.sum(dim=1).mean()) if len(samples) else 0.0,
        "images_per_class": dict(zip(samples.class_names, labels.sum(dim=0).int().tolist(), strict=True)),
        "labels_sha256": hashlib.sha256(listing.encode()).hexdigest(),
    }
    if not samples.has_ground_truth:
        return facts
    shares: list[float] = []
    overlap = torch.zeros(3)  # saliency and ground truth both, saliency, ground truth
    for sample in progress(samples.with_masks(), total=len(samples), desc=f"summary of {samples.split}"):
        assert sample.mask is not None
        counted = sample.mask != VOID_LABEL
        areas = torch.bincount(sample.mask[counted].flatten().long(), minlength=1)[1:]
        shares += (areas[areas > 0] / sample.mask.numel()).tolist()
        if sample.saliency is not None:
            found, there = (sample.saliency > 0.5)[counted], (sample.mask > 0)[counted]
            overlap += torch.stack([(found & there).sum(), found.sum(), there.sum()])
    facts["object_shares"] = [round(share, 4) for share in shares]
    both, found, there = overlap.tolist()
    if found and there:
        facts["saliency"] = {"iou": both / (found + there - both), "precision": both / found, "recall": both / there}
    return facts
