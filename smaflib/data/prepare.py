"""Before a run: download or draw data, paint COCO's masks, and summarise what a data set holds."""

import hashlib
from pathlib import Path
from typing import Any

import torch

from smaflib.config import Config
from smaflib.data.classes import VOID_LABEL
from smaflib.data.coco import write_coco_masks
from smaflib.data.sample import Samples
from smaflib.data.voc import SPLITS
from smaflib.errors import DataError
from smaflib.files import write_json
from smaflib.runtime import num_cores, progress

NO_CLASS = "the masks hold 0 (background) and 255 (void) only; give the pixels of a class its number, 1 for the first"
"""Of masks of a yes or no: 255 is void."""


def fetch_voc12(folder: Path) -> Path:
    """Download PASCAL VOC 2012 (2 GB), check and unpack it, unless it is there; returns the value for ``data.root``."""
    from torchvision.datasets import VOCDetection

    folder.mkdir(parents=True, exist_ok=True)
    try:
        VOCDetection(folder, year="2012", image_set="trainval", download=True)
    except (OSError, RuntimeError) as error:
        cure = f"try again later, or put VOCtrainval_11-May-2012.tar from elsewhere into {folder}"
        raise DataError(f"VOC 2012 could not be downloaded ({error}); {cure} and repeat the command") from error
    return folder / "VOCdevkit" / "VOC2012"


def make_data(config: Config, run_folder: Path) -> dict[str, dict[str, Any]]:
    """Draw the mini data set, or paint COCO's masks for evaluation, unless it exists; then read and describe all data.

    The mini set goes to ``data.root`` or the run folder, COCO's masks to the run folder unless ``data.masks`` is set.
    Returns what :func:`summarize` says by split, which is also written to ``data.json``. Ground truth that cannot be
    used is left out from then on (:meth:`smaflib.workspace.Workspace.samples`), so that it never stops a run.
    """
    data = config.data
    if data.kind == "coco" and data.masks is None:
        for split in SPLITS:
            write_coco_masks(data, split, run_folder)
    root = data.root or run_folder / "data"
    if data.kind == "mini" and not (root.is_dir() and any(root.iterdir())):
        from minidata import make_mini  # minidata imports this package

        # Starting a worker costs as much as drawing a hundred images.
        num_workers = num_cores() if data.num_train + data.num_val >= 300 else 1
        size, seed = data.image_size, config.seed
        make_mini(root, data.num_train, data.num_val, size=size, seed=seed, num_workers=num_workers, progress=progress)
    from smaflib.data import load_samples  # imports this module

    summary: dict[str, dict[str, Any]] = {split: summarize(load_samples(config, split, run_folder)) for split in SPLITS}
    write_json(run_folder / "data.json", summary)
    return summary


def summarize(samples: Samples) -> dict[str, Any]:
    """Count images and labels of a split; with ground truth also object sizes and the quality of saliency maps.

    Returns:
        ``images``, ``labels_per_image``, ``images_per_class``, ``labels_sha256`` (of ids and labels), and with ground
        truth ``object_shares`` (of the image's area) and ``saliency`` (iou, precision, recall of the maps above 0.5
        against the foreground; omitted where they are undefined). ``unusable`` says why masks are no ground truth.
    """
    labels = samples.image_labels
    listing = "\n".join(f"{files.image_id}:{files.labels}" for files in samples.files)
    facts: dict[str, Any] = {
        "images": len(samples),
        "labels_per_image": float(labels.sum(dim=1).mean()) if len(samples) else 0.0,
        "images_per_class": dict(zip(samples.class_names, labels.sum(dim=0).int().tolist(), strict=True)),
        "labels_sha256": hashlib.sha256(listing.encode()).hexdigest(),
    }
    if not samples.annotated:
        return facts
    try:
        return facts | _summarize_ground_truth(samples.annotated)
    except DataError as error:
        samples.without_ground_truth().with_saliency().check_images()  # what training needs must be there
        return facts | {"unusable": str(error)}


def _summarize_ground_truth(samples: Samples) -> dict[str, Any]:
    shares: list[float] = []
    overlap = torch.zeros(3)  # pixels in both saliency and ground truth, in saliency, in ground truth
    loaded = samples.with_ground_truth().with_saliency()
    for sample in progress(loaded, total=len(loaded), desc=f"summary of {samples.split}"):
        assert sample.mask is not None
        counted = sample.mask != VOID_LABEL
        areas = torch.bincount(sample.mask[counted].flatten().long(), minlength=1)[1:]
        shares += (areas[areas > 0] / sample.mask.numel()).tolist()
        if sample.saliency is not None:
            found, there = (sample.saliency > 0.5)[counted], (sample.mask > 0)[counted]
            overlap += torch.stack([(found & there).sum(), found.sum(), there.sum()])
    if not shares:
        raise DataError(NO_CLASS)
    facts: dict[str, Any] = {"object_shares": [round(share, 4) for share in shares]}
    both, found, there = overlap.tolist()
    if found and there:
        facts["saliency"] = {"iou": both / (found + there - both), "precision": both / found, "recall": both / there}
    return facts
