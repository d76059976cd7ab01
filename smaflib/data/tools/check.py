"""Inspect every file of a data set before hours are spent on it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from smaflib.config import Config, Split
from smaflib.data import load_samples
from smaflib.data.classes import VOID_LABEL
from smaflib.data.masks import mask_values
from smaflib.data.sample import Samples
from smaflib.data.voc import SPLITS
from smaflib.errors import DataError, PluginError
from smaflib.runtime import progress

RARE = 10
"""A class on fewer images than this is learned badly."""


@dataclass
class Findings:
    """What was found: facts about what is there, and problems, each with file and cure."""

    facts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Facts, notes and problems for a terminal."""
        lines = [*self.facts]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"PROBLEM: {problem}" for problem in self.problems]
        return "\n".join([*lines, f"{len(self.problems)} problems"])


def check_data(config: Config, run_folder: Path | None = None) -> Findings:
    """Read every image, saliency map and mask of both splits.

    Problems are what would stop a run, now or after hours: a missing or damaged file, a part of another size than its
    image, a mask value without class. Notes are what lets it run and learn badly: rare classes, labels without pixels,
    pixels without label. Masks are opened here for checking only.

    Args:
        config: of the run.
        run_folder: where a mini set lies.
    """
    found = Findings()
    for split in SPLITS:
        _check_split(config, split, found, run_folder)
    return found


def _check_split(config: Config, split: Split, found: Findings, run_folder: Path | None) -> None:
    """One split after the other, so that only one is in memory."""
    try:
        samples = load_samples(config, split, run_folder)
    except (DataError, PluginError) as error:
        found.problems.append(f"{split}: {error}")
        return
    if not len(samples):
        found.facts.append(f"{split}: no images")
        return
    _check_samples(samples, found)
    if config.classifier.pretraining == "eps" and split == "train" and not samples.has_saliency:
        found.problems.append("train: classifier.pretraining is 'eps', but not every image has a saliency map")


def _check_samples(samples: Samples, found: Findings) -> None:
    name, sizes = samples.split, []
    unseen: list[str] = []
    unlabelled: list[str] = []
    with_masks = replace(samples, load_masks=True, cached=False)  # masks where there are some; each sample once
    for index in progress(range(len(samples)), total=len(samples), desc=f"check {name}"):
        try:
            sample = with_masks[index]
        except (DataError, PluginError) as error:
            found.problems.append(f"{name}: {error}")
            continue
        sizes.append((sample.image.shape[2], sample.image.shape[1]))
        if sample.mask is not None:
            there = set(mask_values(sample.mask)) - {0, VOID_LABEL}
            labelled = {number + 1 for number in samples.files[index].labels}
            unseen += [f"{sample.image_id} ({samples.class_names[v - 1]})" for v in sorted(labelled - there)]
            unlabelled += [f"{sample.image_id} ({samples.class_names[v - 1]})" for v in sorted(there - labelled)]
    counts = samples.image_labels.sum(dim=0).int().tolist()
    masks = sum(files.mask is not None for files in samples.files)
    found.facts.append(
        f"{name}: {len(samples)} images, {sum(counts) / len(samples):.2f} labels per image, {masks} masks, "
        f"{sum(files.saliency is not None for files in samples.files)} saliency maps"
    )
    if sizes:
        widths, heights = np.array(sizes).T
        found.facts.append(
            f"{name}: width {widths.min()} to {widths.max()} (median {np.median(widths):.0f}), "
            f"height {heights.min()} to {heights.max()} (median {np.median(heights):.0f})"
        )
    pairs = ", ".join(f"{label} {count}" for label, count in zip(samples.class_names, counts, strict=True))
    found.facts.append(f"{name}: images per class: {pairs}")
    rare = [label for label, count in zip(samples.class_names, counts, strict=True) if count < RARE]
    if name == "train" and rare:
        found.notes.append(f"{name}: on fewer than {RARE} images, so learned badly: {', '.join(rare)}")
    for what, which in (("labels without a pixel in the mask", unseen), ("pixels without a label", unlabelled)):
        if which:
            found.notes.append(f"{name}: {what}: {len(which)}, such as {', '.join(which[:5])}")
