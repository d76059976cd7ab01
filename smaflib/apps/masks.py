"""Masks for custom images from a list of what each image shows: the chain without notebooks and ground truth."""

from __future__ import annotations

import hashlib
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from smaflib import files
from smaflib.config import Config, dump_config
from smaflib.data.masks import mask_values
from smaflib.data.sample import Samples
from smaflib.errors import ConfigError
from smaflib.pipeline import check_custom, check_networks, self_train_rounds, train_teacher, write_maps, write_masks
from smaflib.processes import missing_files
from smaflib.report.html import write_page
from smaflib.report.palette import class_color
from smaflib.report.plots import overlay_mask
from smaflib.runtime import progress
from smaflib.workspace import Workspace

OVERLAY_SIDE = 480
"""Longest side of an overlay, in pixels."""


def make_masks(config: Config, out: Path) -> Path:
    """Learn from images and image labels, and write a mask for each image. An interrupted call resumes.

    Args:
        config: of kind ``folder``, such as ``configs/custom.yaml`` with the paths set.
        out: folder for ``masks/`` (palette PNGs), ``overlays/``, ``index.html`` (the contact sheet), and networks and
            maps, laid out like a run.

    Returns:
        Path of the contact sheet.

    Raises:
        ConfigError: if ``out`` holds other files, or masks made from other images, labels or settings.
        DataError: if an image or the label table cannot be used.
    """
    check_custom(config)
    work = Workspace(out, config)
    samples = work.samples()
    if not work.checkpoint("teacher").is_file():  # before anything is written
        check_networks(config, samples.class_names)
        samples.check_images()
    _claim(out, config, samples)
    with files.locked(out, "smaf masks"):
        if missing_files(out / "masks", samples.image_ids):
            train_teacher(work)
            write_maps(work, "teacher")
            self_train_rounds(work)
            write_masks(work)
        return _write_contact_sheet(work, samples)


def images_and_labels(samples: Samples) -> str:
    """The first line of ``config.yaml``, which tells these images and labels from others."""
    listing = "\n".join(f"{file.image}:{file.labels}:{file.image.stat().st_size}" for file in samples.files)
    return f"# images and labels: {hashlib.sha256(listing.encode()).hexdigest()}"


def check_out(out: Path) -> None:
    """Refuse a folder of other files than ours; ``labels.csv`` may be there."""
    names = {path.name for path in out.glob("[!.]*")} - {"labels.csv"}
    if names and "config.yaml" not in names:
        raise ConfigError(f"{out} is not empty and was not written by smaf masks; choose another --out")


def _claim(out: Path, config: Config, samples: Samples) -> None:
    """Note in ``config.yaml`` that the folder belongs to this config and these images, or check that it does.

    A folder in which no network was trained belongs to nobody.
    """
    claim = f"{images_and_labels(samples)}\n{dump_config(config)}"
    note = out / "config.yaml"
    if not note.is_file():
        check_out(out)
        files.write_text(note, claim)
    elif not (out / "checkpoints").is_dir():
        files.write_text(note, claim)
    elif note.read_text(encoding="utf-8") != claim:
        raise ConfigError(
            f"{out} holds masks made from other images, labels or settings; choose another --out, or delete all in it "
            "but labels.csv"
        )


def _write_contact_sheet(work: Workspace, samples: Samples) -> Path:
    out, cards, masks = work.folder, [], work.masks(samples)
    for index, file in enumerate(progress(samples.files, total=len(samples), desc="overlays")):
        mask, overlay = masks[index], out / "overlays" / f"{file.image_id}.jpg"
        if not overlay.is_file():
            picture = Image.fromarray(overlay_mask(samples[index].image, mask))
            picture.thumbnail((OVERLAY_SIDE, OVERLAY_SIDE))
            files.save_image(overlay, picture)
        found = set(mask_values(mask))
        labels = [(samples.class_names[number], number + 1 in found, class_color(number)) for number in file.labels]
        cards.append(
            {
                "name": file.image_id,
                "labels": labels,
                "share": float((mask > 0).float().mean()),
                "overlay": quote(f"overlays/{overlay.name}"),
                "mask": quote(f"masks/{file.image_id}.png"),
            }
        )
    return write_page(out / "index.html", "contact_sheet.html.j2", cards=cards)
