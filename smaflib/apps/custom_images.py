"""Masks for custom images, from a list of what each shows: the chain without notebooks, metrics and ground truth.

:func:`make_masks` learns from the photos and their labels and makes the masks; :func:`label_images` uses what was
learned on photos without labels. Both write palette PNGs, an overlay per photo and a contact sheet, and go on where
they stopped.
"""

from __future__ import annotations

import csv
import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import torch
from PIL import Image

from smaflib import files
from smaflib.cams import write_attention_maps
from smaflib.classifier import classify, train_classifier
from smaflib.config import Config, dump_config, load_config
from smaflib.data import load_samples
from smaflib.data.labels import IMAGE_ENDINGS
from smaflib.data.masks import VOC_PALETTE, mask_values, read_mask
from smaflib.data.sample import Samples
from smaflib.data.voc import list_files
from smaflib.errors import ConfigError, DataError
from smaflib.models.networks import AttentionNetwork, load_attention_network
from smaflib.pseudo_masks import write_pseudo_masks
from smaflib.report.html import write_page
from smaflib.report.plots import overlay_mask
from smaflib.runtime import Runtime, make_runtime, progress
from smaflib.self_training import DenoisedMaps, self_train, student_targets
from smaflib.thresholds import mask_bg_score, resolve_bg_score

OVERLAY_SIDE = 480
"""Longest side of an overlay, in pixels."""


def make_masks(config: Config, out: Path) -> Path:
    """Learn from photos and image labels, and write a mask for each photo.

    Args:
        config: of kind ``folder``, such as ``configs/custom.yaml`` with the paths set.
        out: takes ``masks/``, ``overlays/``, ``index.html`` and, in ``work/``, what was learned.

    Returns:
        The contact sheet.

    Raises:
        ConfigError: if ``out`` holds the work on other photos, labels or settings.
        DataError: if a photo or the table cannot be used.
    """
    samples = load_samples(config, "train")
    _claim(out, config, samples)
    runtime, work = make_runtime(config), out / "work"
    teacher, _ = train_classifier(samples, config, runtime, work / "teacher.safetensors")
    maps = write_attention_maps(teacher, samples, work / "cams_teacher", config.attention, runtime)
    resolved = resolve_bg_score(config, DenoisedMaps(maps, samples, config.attention.fusion))
    student, rounds = teacher, config.self_training.rounds
    for number in range(1, rounds + 1):
        name = "student" if number == rounds else f"student_round{number}"
        denoised = DenoisedMaps(maps, samples, config.attention.fusion, cached=config.data.cache)
        targets = student_targets(samples, denoised, resolved, runtime.device)
        student, _ = self_train(student, samples, targets, resolved, runtime, work / f"{name}.safetensors")
        maps = write_attention_maps(student, samples, work / f"cams_{name}", config.attention, runtime)
    bg_score = _write_masks(student, samples, config, out, runtime)
    files.write_json(work / "facts.json", {"class_names": samples.class_names, "bg_score": bg_score})
    return _write_contact_sheet(samples, out)


def label_images(learned: Path, images: Path, out: Path) -> Path:
    """Label photos that have no table with what :func:`make_masks` has learned from others.

    A photo's labels are the classes whose logit is above 0, or the likeliest one where none is. They are written to
    ``labels.csv``, to be corrected and given to :func:`make_masks` next time.

    Args:
        learned: the ``out`` folder of an earlier :func:`make_masks`.
        images: the folder of photos.
        out: takes ``labels.csv``, ``masks/``, ``overlays/``, ``index.html``.

    Returns:
        The contact sheet.

    Raises:
        ConfigError: if nothing was learned in ``learned``, or ``out`` holds the work on other photos.
        DataError: if there is no photo in ``images``.
    """
    facts_file = learned / "work" / "facts.json"
    if not facts_file.is_file():
        raise ConfigError(f"{learned} holds no finished `smaf masks --labels ...`; name the folder that it wrote")
    facts = json.loads(facts_file.read_text(encoding="utf-8"))
    class_names = tuple(facts["class_names"])
    photos = list_files(images, IMAGE_ENDINGS, "name the folder of photos")
    if not photos:
        raise DataError(f"there is no photo in {images}; {', '.join(IMAGE_ENDINGS)} files are read")
    base = load_config(learned / "work" / "config.yaml")
    table = out / "labels.csv"
    data = base.data.model_copy(
        update={
            "images": images,
            "labels": table,
            "class_names": class_names,
            "masks": None,
            "saliency": None,
            "max_images": None,
        }
    )
    # What was chosen on the photos that were learned from; a few new ones say less about it.
    masks = base.pseudo_masks.model_copy(update={"bg_score": facts["bg_score"]})
    config = base.model_copy(update={"data": data, "pseudo_masks": masks})
    runtime = make_runtime(config)
    if not table.is_file():
        teacher = load_attention_network(learned / "work" / "teacher.safetensors", config.model, len(class_names))
        _write_labels(teacher, photos, class_names, table, config, runtime)
    samples = load_samples(config, "train")
    if added := sorted({photo.name for photo in photos} - {file.image.name for file in samples.files}):
        raise ConfigError(
            f"{out} holds masks made of other photos: {added[0]} is not in {table}; choose another --out, or delete "
            "it first"
        )
    _claim(out, config, samples)
    student = load_attention_network(learned / "work" / "student.safetensors", config.model, len(class_names))
    _write_masks(student, samples, config, out, runtime)
    return _write_contact_sheet(samples, out)


def _claim(out: Path, config: Config, samples: Samples) -> None:
    """Make ``out`` the folder of this config and these photos, or find that it is so already."""
    listing = "\n".join(f"{file.image}:{file.labels}:{file.image.stat().st_size}" for file in samples.files)
    digest = hashlib.sha256(listing.encode()).hexdigest()
    settings, photos = out / "work" / "config.yaml", out / "work" / "photos.json"
    if settings.is_file() and photos.is_file():
        same = settings.read_text(encoding="utf-8") == dump_config(config)
        if not same or json.loads(photos.read_text(encoding="utf-8"))["sha256"] != digest:
            what = "photos or labels" if same else "settings"
            raise ConfigError(f"{out} holds masks made with other {what}; choose another --out, or delete it first")
        return
    if out.is_dir() and any(path.name not in ("labels.csv", "work") for path in out.iterdir()):
        raise ConfigError(f"{out} is not empty and holds nothing of smaf's; choose another --out")
    try:
        files.write_text(settings, dump_config(config))
        files.write_json(photos, {"sha256": digest, "photos": len(samples)})
    except OSError as error:
        raise ConfigError(f"{out} cannot be written to: {error}; choose another --out") from error


def _write_masks(student: AttentionNetwork, samples: Samples, config: Config, out: Path, runtime: Runtime) -> float:
    maps = write_attention_maps(student, samples, out / "work" / "cams_student", config.attention, runtime)
    denoised = DenoisedMaps(maps, samples, config.attention.fusion)
    bg_score = mask_bg_score(config, denoised)
    write_pseudo_masks(samples, denoised, out / "masks", bg_score, config.pseudo_masks, runtime.device)
    return bg_score


def _write_labels(
    teacher: AttentionNetwork,
    photos: Sequence[Path],
    class_names: tuple[str, ...],
    table: Path,
    config: Config,
    runtime: Runtime,
) -> None:
    with tempfile.TemporaryDirectory() as folder:  # the loader wants a table, and there is none yet
        draft = Path(folder) / "labels.csv"
        _write_table(draft, [[photo.name, class_names[0]] for photo in photos])
        unlabelled = config.model_copy(update={"data": config.data.model_copy(update={"labels": draft})})
        logits = classify(teacher, load_samples(unlabelled, "train"), runtime)
    rows = []
    for photo, row in zip(photos, logits, strict=True):
        chosen = torch.nonzero(row > 0)[:, 0].tolist() or [int(row.argmax())]
        rows.append([photo.name, ";".join(class_names[number] for number in chosen)])
    _write_table(table, rows)


def _write_table(path: Path, rows: list[list[str]]) -> None:
    with files.replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["image", "labels"], *rows])


def _write_contact_sheet(samples: Samples, out: Path) -> Path:
    cards = []
    for index, file in enumerate(progress(samples.files, total=len(samples), desc="overlays")):
        mask, overlay = read_mask(out / "masks" / f"{file.image_id}.png"), out / "overlays" / f"{file.image_id}.jpg"
        if not overlay.is_file():
            picture = Image.fromarray(overlay_mask(samples[index].image, mask))
            picture.thumbnail((OVERLAY_SIDE, OVERLAY_SIDE))
            files.save_image(overlay, picture)
        found = set(mask_values(mask))
        # As in the mask: a label's value is its class's number plus 1.
        labels = [
            (samples.class_names[number], number + 1 in found, "#" + bytes(VOC_PALETTE[number + 1]).hex())
            for number in file.labels
        ]
        share = float((mask > 0).float().mean())
        cards.append(
            {
                "name": file.image_id,
                "labels": labels,
                "share": share,
                "overlay": quote(f"overlays/{overlay.name}"),
                "mask": quote(f"masks/{file.image_id}.png"),
            }
        )
    return write_page(out / "index.html", "contact_sheet.html.j2", cards=cards)
