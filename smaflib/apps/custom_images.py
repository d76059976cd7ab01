"""Masks for custom images, from a list of what each shows: the chain without notebooks, metrics and ground truth.

:func:`make_masks` learns from images and their labels and makes the masks; :func:`label_images` uses what was learned
on images without labels. Both write palette PNGs, an overlay per image and a contact sheet, and resume where they
stopped. The folder that they write is a :class:`~smaflib.pipeline.Workspace`, laid out like a run.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from smaflib import files
from smaflib.classifier import classify, learned_views, predict_labels
from smaflib.config import Config, dump_config, load_config
from smaflib.data.folder import unlabelled_samples
from smaflib.data.masks import mask_values, read_mask
from smaflib.data.sample import Samples
from smaflib.data.tools.check import RARE
from smaflib.errors import ConfigError
from smaflib.models.networks import load_attention_network
from smaflib.pipeline import (
    Workspace,
    are_there,
    check_networks,
    check_plugins,
    read_bg_score,
    resolve_bg_score,
    self_train_rounds,
    train_teacher,
    write_maps,
    write_masks,
)
from smaflib.plugins import search_in
from smaflib.report.html import write_page
from smaflib.report.palette import class_color
from smaflib.report.plots import overlay_mask
from smaflib.runs.inputs import claim_code
from smaflib.runs.manifest import StoredPlugin
from smaflib.runtime import progress

OVERLAY_SIDE = 480
"""Longest side of an overlay, in pixels."""


def make_masks(config: Config, out: Path) -> Path:
    """Learn from images and image labels, and write a mask for each image.

    Args:
        config: of kind ``folder``, such as ``configs/custom.yaml`` with the paths set.
        out: takes ``masks/``, ``overlays/``, ``index.html``, and what was learned, laid out like a run.

    Returns:
        The contact sheet.

    Raises:
        ConfigError: if ``out`` holds the work on other images, labels or settings.
        DataError: if an image or the table cannot be used.
    """
    check_plugins(config)
    samples = Workspace(out, config).samples()
    # The classes are stored with the settings: label_images needs them where there is no table.
    config = config.model_copy(update={"data": config.data.model_copy(update={"class_names": samples.class_names})})
    work = Workspace(out, config)
    if not work.checkpoint("teacher").is_file():
        check_networks(config)  # before the folder is claimed
    _claim(out, config, samples)
    with files.locked(out, "smaf masks"):
        if not are_there(work.path("masks"), samples):
            train_teacher(work)
            write_maps(work, "teacher")
            resolve_bg_score(work)
            self_train_rounds(work)
            write_masks(work)
        return _write_contact_sheet(samples, out)


def plan_masks(config: Config, out: Path) -> str:
    """What :func:`make_masks` would do, after all that it checks before it trains. Nothing is written.

    Args:
        config: as of :func:`make_masks`.
        out: the same.

    Returns:
        Lines for a terminal.

    Raises:
        ConfigError: if settings, network, memory or ``out`` will not do.
        DataError: if the table cannot be used. Images are not decoded: ``smaf data check`` does that.
    """
    check_plugins(config)
    samples = Workspace(out, config).samples()
    check_networks(config)
    _refuse_foreign(out)
    counts = samples.image_labels.sum(dim=0).int().tolist()
    by_count = sorted(zip(counts, samples.class_names, strict=True), reverse=True)
    rare = [name for count, name in by_count if count < RARE]
    there = {path.stem for path in (out / "masks").glob("*.png")}
    done = sum(image_id in there for image_id in samples.image_ids)
    lines = [
        f"{len(samples)} images, {sum(counts)} labels of {len(counts)} classes; {done} have their masks already",
        "images per class: " + ", ".join(f"{name} {count}" for count, name in by_count),
        *([f"note: on fewer than {RARE} images, so learned badly: {', '.join(rare)}"] if rare else []),
        f"network: {config.model.backbone}, weights: {config.model.weights or 'random'}",
        f"results would be in {out}",
    ]
    return "\n".join(lines)


def label_images(learned: Path, images: Path, out: Path) -> Path:
    """Label images that have no table with what :func:`make_masks` has learned from others.

    An image's labels are the classes whose logit is above 0, or the likeliest one where none is. They are written to
    ``labels.csv``, to be corrected and given to :func:`make_masks` next time.

    Args:
        learned: the ``out`` folder of an earlier :func:`make_masks`.
        images: the folder of images.
        out: takes ``labels.csv``, ``masks/``, ``overlays/``, ``index.html``.

    Returns:
        The contact sheet.

    Raises:
        ConfigError: if nothing was learned in ``learned``, or ``out`` holds the work on other images.
        DataError: if there is no image in ``images``.
        RunError: if what was learned is damaged. Nothing is written before all of it has been read.
    """
    bg_score = read_bg_score(learned / "bg_scores" / "student.json")
    if bg_score is None or not (learned / "config.yaml").is_file():
        raise ConfigError(f"{learned} holds no finished `smaf masks --labels ...`; name the folder that it wrote")
    source = Workspace(learned, load_config(learned / "config.yaml"))
    if source.config.plugins:
        facts = files.read_json(learned / "plugins.json", {}, dict[str, StoredPlugin])
        search_in(*(files.absolute(each["folder"]) for each in facts.values()))
        check_plugins(source.config)
        claim_code(source.config, learned / "plugins.json", str(learned))
    class_names = source.config.data.class_names
    teacher, _ = (
        load_attention_network(source.checkpoint(name), source.config.model, len(class_names))
        for name in ("teacher", "student")
    )
    table = out / "labels.csv"
    unset = {"kind": "folder", "masks": None, "saliency": None, "max_images": None}
    data = source.config.data.model_copy(update={"images": images, "labels": table, **unset})
    # The score is what was chosen on the images that were learned from; a few new ones say less about it. They have no
    # saliency maps.
    masks = source.config.pseudo_masks.model_copy(update={"bg_score": bg_score, "saliency_weight": 0.0})
    work = Workspace(out, source.config.model_copy(update={"data": data, "pseudo_masks": masks}))
    unlabelled = unlabelled_samples(images, class_names)
    _refuse_foreign(out)
    if not table.is_file():
        logits = classify(teacher, unlabelled, work.make_runtime(), learned_views(source.config))
        rows = zip(unlabelled.files, predict_labels(logits).bool().tolist(), strict=True)
        _write_table(
            table,
            [
                [
                    file.image.name,
                    ";".join(name for name, there in zip(unlabelled.class_names, row, strict=True) if there),
                ]
                for file, row in rows
            ],
        )
    samples = work.samples()
    if added := sorted({file.image.name for file in unlabelled.files} - {file.image.name for file in samples.files}):
        raise ConfigError(
            f"{out} holds masks made of other images: {added[0]} is not in {table}; choose another --out, or delete "
            "it first"
        )
    _claim(out, work.config, samples)
    with files.locked(out, "smaf masks"):
        files.copy_file(source.checkpoint("student"), work.checkpoint("student"))
        write_maps(work, "student")
        write_masks(work)
        return _write_contact_sheet(samples, out)


def _claim(out: Path, config: Config, samples: Samples) -> None:
    """Make ``out`` the folder of this config and these images, or find that it is so already."""
    code = out / "plugins.json"
    listing = "\n".join(f"{file.image}:{file.labels}:{file.image.stat().st_size}" for file in samples.files)
    digest = hashlib.sha256(listing.encode()).hexdigest()
    settings, images = out / "config.yaml", out / "images.json"
    if settings.is_file() and images.is_file():
        same_images = files.read_json(images, {}).get("sha256") == digest
        if not same_images or settings.read_text(encoding="utf-8") != dump_config(config):
            what = "settings" if same_images else "images or labels"
            raise ConfigError(f"{out} holds masks made with other {what}; choose another --out, or delete it first")
        claim_code(config, code, str(out))
        return
    _refuse_foreign(out)
    try:
        claim_code(config, code, str(out))
        files.write_text(settings, dump_config(config))
        files.write_json(images, {"sha256": digest, "images": len(samples)})
    except OSError as error:
        raise ConfigError(f"{out} cannot be written to: {error}; choose another --out") from error


def _refuse_foreign(out: Path) -> None:
    """Refuse to write into a folder of somebody else's."""
    ours = {"config.yaml", "images.json"}
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if names - {"labels.csv", "config.yaml", "plugins.json"} and not ours <= names:
        raise ConfigError(f"{out} is not empty and holds nothing of smaf's; choose another --out")


def _write_table(path: Path, rows: Sequence[Sequence[str]]) -> None:
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
        labels = [(samples.class_names[number], number + 1 in found, class_color(number)) for number in file.labels]
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
