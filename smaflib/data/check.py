"""Inspect every file of a data set before a long run: ``smaf data check``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from smaflib.config import Config
from smaflib.data import load_samples
from smaflib.data.classes import VOID_LABEL
from smaflib.data.masks import mask_values
from smaflib.data.sample import Samples
from smaflib.data.voc import SPLITS
from smaflib.errors import InputError
from smaflib.runtime import progress

RARE = 10
"""A class on fewer images than this is learned badly."""


@dataclass
class Findings:
    """Facts about a data set, notes on what makes it hard to learn, and problems that would stop a run."""

    facts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Facts, notes and problems for a terminal."""
        notes = [f"note: {note}" for note in self.notes]
        problems = [f"PROBLEM: {problem}" for problem in self.problems]
        return "\n".join([*self.facts, *notes, *problems, f"{len(problems)} problems"])


def check_data(config: Config, run_folder: Path | None = None) -> Findings:
    """Read every image, saliency map and mask of both splits.

    Problems are missing and damaged files, sizes that differ from the image's, and mask values without a class. Notes
    are rare classes, labels without pixels and pixels without a label.

    Args:
        config: of the run.
        run_folder: contains a mini set.
    """
    found = Findings()
    for split in SPLITS:
        try:
            samples = load_samples(config, split, run_folder)
        except InputError as error:
            found.problems.append(f"{split}: {error}")
            continue
        if len(samples):
            _check_samples(samples, found)
        else:
            found.facts.append(f"{split}: no images")
        if config.classifier.pretraining == "eps" and split == "train" and not samples.has_saliency:
            found.problems.append("train: classifier.pretraining is 'eps', but not every image has a saliency map")
    return found


def _check_samples(samples: Samples, found: Findings) -> None:
    name, names = samples.split, samples.class_names
    sizes: list[tuple[int, ...]] = []
    unseen: list[str] = []
    unlabelled: list[str] = []
    everything = replace(samples, load_saliency=True, load_ground_truth=True, cached=False)
    for index in progress(range(len(samples)), total=len(samples), desc=f"check {name}"):
        try:
            sample = everything[index]
        except InputError as error:
            found.problems.append(f"{name}: {error}")
            continue
        sizes.append(tuple(sample.image.shape[1:]))
        if sample.mask is not None:
            there = set(mask_values(sample.mask)) - {0, VOID_LABEL}
            labelled = {number + 1 for number in samples.files[index].labels}
            unseen += [f"{sample.image_id} ({names[value - 1]})" for value in sorted(labelled - there)]
            unlabelled += [f"{sample.image_id} ({names[value - 1]})" for value in sorted(there - labelled)]
    counts = dict(zip(names, samples.image_labels.sum(dim=0).int().tolist(), strict=True))
    masks = sum(files.mask is not None for files in samples.files)
    saliency = sum(files.saliency is not None for files in samples.files)
    found.facts.append(
        f"{name}: {len(samples)} images, {sum(counts.values()) / len(samples):.2f} labels per image, {masks} masks, "
        f"{saliency} saliency maps"
    )
    if sizes:
        (low_h, low_w), (mid_h, mid_w), (high_h, high_w) = np.percentile(sizes, (0, 50, 100), axis=0).astype(int)
        found.facts.append(
            f"{name}: width {low_w} to {high_w} (median {mid_w}), height {low_h} to {high_h} (median {mid_h})"
        )
    found.facts.append(f"{name}: images per class: " + ", ".join(f"{label} {count}" for label, count in counts.items()))
    rare = [label for label, count in counts.items() if count < RARE]
    if name == "train" and rare:
        found.notes.append(f"{name}: on fewer than {RARE} images, so learned badly: {', '.join(rare)}")
    for what, which in (("labels without a pixel in the mask", unseen), ("pixels without a label", unlabelled)):
        if which:
            found.notes.append(f"{name}: {what}: {len(which)}, such as {', '.join(which[:5])}")
