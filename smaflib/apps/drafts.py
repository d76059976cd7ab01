"""A table of labels for photos without one: names of their subfolders, or drafts from ImageNet's predictions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from smaflib.apps.masks import check_out
from smaflib.config import Config, load_config
from smaflib.data.labels import IMAGE_ENDINGS
from smaflib.data.voc import find_images, list_files, open_image
from smaflib.errors import DataError
from smaflib.files import SHIPPED, shown_path, write_text
from smaflib.runtime import make_runtime, progress
from smaflib.sources.imagenet import KINDS, NUM_CLASSES, ImageNetClassifier, match_classes, synonyms

PROBABLE = 0.1
"""Probability from which a label is drafted (benchmarks/drafts.py)."""


def coarse_names() -> dict[str, list[int]]:
    """ImageNet's numbers by names that a person would write: the kinds of :data:`KINDS`, else WordNet's first name."""
    kinds = match_classes([names.split()[0].replace("_", " ") for names in KINDS])
    table = {name: [*numbers] for name, numbers in kinds.items() if numbers}
    taken = " ".join(KINDS).split()  # a carpenter's plane is no plane
    for number in sorted({*range(NUM_CLASSES)}.difference(*kinds.values())):
        name = next(name for name in synonyms()[number].split(", ") if name not in taken)
        table.setdefault(name, []).append(number)
    return table


def photos_config(images: Path, labels: Path | None, out: Path, settings: Sequence[str] = ()) -> Config:
    """Settings of ``configs/custom.yaml`` for a folder of photos, with overrides such as ``seed=1``.

    Without a table of labels ``out/labels.csv`` is taken, and written if it is not there (:func:`write_label_table`).
    """
    paths = {"data.images": images, "data.labels": labels or out / "labels.csv"}
    # As JSON, since a path may look like YAML.
    named = [f"{key}={json.dumps(str(path.absolute()), ensure_ascii=False)}" for key, path in paths.items()]
    config = load_config(SHIPPED / "configs" / "custom.yaml", [*named, *settings])
    if labels is None:
        check_out(out.absolute())
        print(write_label_table(config))
    return config


def write_label_table(config: Config) -> str:
    """Write ``data.labels`` for the photos in ``data.images``, unless it is there; returns a sentence on its origin.

    A subfolder's name is the label of its photos; photos beside subfolders have none. Without subfolders, labels are
    the names, those of ``data.class_names`` if it has any, whose probability is at least :data:`PROBABLE`.
    DataError if there is no photo, one cannot be read or two would share a mask; nothing is written.
    """
    folder, table = config.data.images, config.data.labels
    assert folder is not None and table is not None  # Config has checked it
    if table.is_file():
        return f"Labels: {shown_path(table)}; delete it to have them made anew."
    paths = list_files(folder, IMAGE_ENDINGS, "name a folder of photos", below=True)
    photos = [path.relative_to(folder).as_posix() for path in paths if path.parent != table.parent]
    if not find_images(photos, folder, "", "give a table with --labels"):
        raise DataError(f"{folder} holds no photo; name a folder of .jpg, .png or .webp files")
    rows = [{"image": photo, "labels": photo.rpartition("/")[0]} for photo in photos]
    origin = "are the names of the subfolders; photos beside these show none of them."
    if not any(row["labels"] for row in rows):
        origin = "are drafts from ImageNet's classifier: correct the table and give the same command again."
        make_runtime(config)  # sets torch's threads
        wanted = config.data.class_names
        network, names = ImageNetClassifier(), match_classes(wanted) if wanted else coarse_names()
        for row in progress(rows, len(rows), "draft labels"):
            found = network.probabilities(open_image(folder / row["image"]))
            scores = {name: float(found[[*numbers]].sum()) for name, numbers in names.items()}
            likeliest = sorted(scores, key=lambda name: -scores[name])[:5]
            row["labels"] = ";".join(name for name in likeliest if scores[name] >= PROBABLE)
            row["scores"] = ";".join(f"{name} {scores[name]:.2f}" for name in likeliest)
    write_text(table, pd.DataFrame(rows).to_csv(index=False))
    return f"The labels in {shown_path(table)} {origin}"
