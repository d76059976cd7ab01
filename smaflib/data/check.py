"""Inspect every file of a data set before a long run: ``smaf data check``."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from smaflib.config import Config
from smaflib.data import load_samples
from smaflib.data.classes import VOID_LABEL
from smaflib.data.masks import mask_values
from smaflib.data.prepare import NO_CLASS, summarize
from smaflib.data.sample import Samples
from smaflib.data.voc import SPLITS
from smaflib.errors import InputError
from smaflib.runtime import progress


def check_data(config: Config, run_folder: Path | None = None) -> tuple[list[str], list[str]]:
    """Read every image, saliency map and mask of both splits; ``run_folder`` contains a mini set.

    Returns facts, such as counts and labels without pixels, and problems that would stop a run, such as damaged files.
    """
    facts: list[str] = []
    problems: list[str] = []
    for split in SPLITS:
        try:
            samples = load_samples(config, split, run_folder)
        except InputError as error:
            problems.append(f"{split}: {error}")
            continue
        found = _check_samples(samples, problems) if len(samples) else ["no images"]
        facts += [f"{split}: {fact}" for fact in found]
    return facts, problems


def _check_samples(samples: Samples, problems: list[str]) -> list[str]:
    """The facts of a split; its problems are appended to ``problems``."""
    names, sizes, in_masks, before = samples.class_names, [], set[int](), len(problems)
    differing: dict[str, list[str]] = {"labels without a pixel in the mask": [], "pixels without a label": []}
    everything = replace(samples, load_saliency=True, load_ground_truth=True, cached=False, longest_side=None)
    for index in progress(range(len(samples)), total=len(samples), desc=f"check {samples.split}"):
        try:
            sample = everything[index]
        except InputError as error:
            problems.append(f"{samples.split}: {error}")
            continue
        sizes.append(sample.image.shape[1:])
        if sample.mask is not None:
            seen = set(mask_values(sample.mask)) - {0, VOID_LABEL}
            in_masks |= seen
            labelled = {number + 1 for number in samples.files[index].labels}
            for which, values in zip(differing.values(), (labelled - seen, seen - labelled), strict=True):
                which += [f"{sample.image_id} ({names[value - 1]})" for value in sorted(values)]
    if samples.annotated and not in_masks and len(problems) == before:  # all masks were read
        problems.append(f"{samples.split}: {NO_CLASS}")
    of_labels = summarize(samples.without_ground_truth())
    counts, per_image = of_labels["images_per_class"], of_labels["labels_per_image"]
    masks, saliency = len(samples.annotated), sum(files.saliency is not None for files in samples.files)
    facts = [
        f"{len(samples)} images, {per_image:.2f} labels per image, {masks} masks, {saliency} saliency maps",
        f"images per class: {', '.join(f'{name} {count}' for name, count in counts.items())}",
    ]
    if sizes:
        (low_h, low_w), (mid_h, mid_w), (high_h, high_w) = np.percentile(sizes, (0, 50, 100), axis=0).astype(int)
        facts.append(f"width {low_w} to {high_w} (median {mid_w}), height {low_h} to {high_h} (median {mid_h})")
    return facts + [f"{what}: {len(few)}, such as {', '.join(few[:5])}" for what, few in differing.items() if few]
