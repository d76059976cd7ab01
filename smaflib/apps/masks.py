"""Masks for custom images from a list of what each image shows: the chain without notebooks and ground truth.

``made.json`` says what the files of each photo are made from. Where that changes, they are deleted, then the record is
written, then they are made again: however a call ends, what is there fits the record.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

import pandas as pd
import torch
from PIL import Image

from smaflib import files
from smaflib.apps.confidence import Signs, judge, signs
from smaflib.apps.corrections import Correction, check_corrected, read_corrections
from smaflib.config import Config, config_differences, dump_config, load_config
from smaflib.data.masks import read_mask, save_mask
from smaflib.data.sample import Samples
from smaflib.errors import ConfigError
from smaflib.evaluation import evaluate
from smaflib.pipeline import check_custom, check_networks, self_train_rounds, train_teacher, write_maps, write_masks
from smaflib.reactivation import hard_labels
from smaflib.report.html import write_page
from smaflib.report.palette import class_color
from smaflib.report.plots import overlay_mask
from smaflib.runtime import progress
from smaflib.training import is_finished
from smaflib.workspace import Workspace

OVERLAY_SIDE = 1024
"""Longest side of an overlay, in pixels."""

NUM_FIRST, USUAL_BG_SCORE = 8, 0.5
"""Photos whose masks come first, and their background threshold; ``auto`` chose 0.45 or 0.5 for folders of COCO."""

BY_A_PERSON = {"labels.csv", "corrections.csv", "corrected"}
SHOWN = ("masks", "overlays", "overlays_before")
MADE = ("checkpoints", "cams", "bg_scores", "made", *SHOWN)


def make_masks(config: Config, out: Path, retrain: bool = False) -> Path:
    """Learn from images and image labels, and write a mask for each image. An interrupted call resumes.

    The first :data:`NUM_FIRST` photos come first, then all by the teacher, then by the student; where ImageNet's
    classifier knows all classes, nothing is trained. A later call makes anew, with the networks that are there, what
    depends on changed labels and on a person's files (:mod:`smaflib.apps.corrections`).

    Args:
        config: of kind ``folder``, such as ``configs/custom.yaml`` with the paths set.
        out: folder for ``masks/`` (palette PNGs), ``masks.csv``, ``index.html`` (the contact sheet), overlays,
            ``made/`` (masks before a person replaced them), and networks and maps, laid out like a run.
        retrain: train again if settings, photos, labels or corrected masks have changed.

    Returns:
        Path of the contact sheet.

    Raises:
        ConfigError: if ``out`` holds other files, or networks of other settings, photos or classes.
        DataError: if an image, a table or a corrected mask cannot be used.
    """
    check_custom(config)
    check_out(out)
    work = open_masks(out, config, retrain)
    samples = replace(work, leave_out=frozenset()).samples()
    corrections, corrected = read_corrections(out, samples), check_corrected(work, samples)
    if retrain or not _is_trained(work):  # before anything is written
        check_networks(config, samples.class_names)
        samples.check_images()
    with files.locked(out, "smaf masks"):
        own = {name: each.bg_score for name, each in corrections.items() if each.bg_score is not None}
        record = _claim(work, config, samples, corrected, retrain)
        for network in ("student",) if _is_trained(work) else ("teacher", "student"):
            if network == "teacher":
                train_teacher(work)
            elif not _is_trained(work):
                print(f"{files.shown_path(out / 'index.html')}: all masks; the network now trains on them")
                self_train_rounds(work)
            for part in [work] if work.path("masks").is_dir() else [_first(work), work]:
                whole = part is work
                _renew(part, record, samples, corrections, corrected, network if whole else f"{network} at first")
                write_maps(part, network)
                write_masks(part, network, "made", own)
                _write_overlays(part, record, own, network)
                files.write_json(out / "made.json", record)
                write_sheet(part, samples if whole else part.samples(), record)
                if not whole:
                    print(f"{files.shown_path(out / 'index.html')}: the first masks")
        if corrected:
            drawn, learned = work.corrected(), len(corrected.keys() & record["learned"]["corrected"].keys())
            scores = evaluate(work.masks(drawn, "made"), drawn.ground_truth or (), drawn.class_names)
            about = f"{len(drawn)} corrected photos, of which the networks learned {learned}"
            print(f"mIoU of the made masks on {about}: {100 * scores.miou:.1f} %")
        return out / "index.html"


def check_out(out: Path) -> None:
    """ConfigError if a folder holds other files than ours and a person's."""
    names = {path.name for path in out.glob("[!.]*")} - BY_A_PERSON - {"config.yaml"}
    if names and not (out / "made.json").is_file():
        raise ConfigError(f"{out} is not empty and was not written by smaf masks; choose another --out")


def open_masks(out: Path, config: Config | None = None, retrain: bool = False) -> Workspace:
    """The folder of :func:`make_masks`: without the photos left out, and with the classes that its networks know."""
    keep = config is None or any(out.glob("corrected/*.png"))
    config, known = config or load_config(out / "config.yaml"), files.read_json(out / "made.json", {})
    work, names = Workspace(out, config), known.get("learned", {}).get("class_names", [])
    keep = keep or (_is_trained(work) and not retrain)
    if keep and names and not config.data.class_names:  # new ones come last: the values in masks stay
        names = (*names, *(name for name in work.samples().class_names if name not in names))
        config = config.model_copy(update={"data": config.data.model_copy(update={"class_names": names})})
    left_out = frozenset(name for name, each in read_corrections(out).items() if each.leave_out)
    return Workspace(out, config, leave_out=left_out)


def _is_trained(work: Workspace) -> bool:
    return work.untrained or is_finished(work.checkpoint("student"), work.config.self_training)


def _first(work: Workspace) -> Workspace:
    """The first photos alone. Instead of ``bg_score: auto``, which needs the maps of all, they get a usual one."""
    masks, bg_score = work.config.pseudo_masks, work.config.attention.bg_score
    if (masks.bg_score or bg_score) == "auto":
        masks = masks.model_copy(update={"bg_score": USUAL_BG_SCORE})
    config = work.config.model_copy(update={"pseudo_masks": masks})
    return replace(work, config=config, leave_out=work.leave_out.union(work.samples().image_ids[NUM_FIRST:]))


def _claim(
    work: Workspace, config: Config, samples: Samples, corrected: Mapping[str, str], retrain: bool
) -> dict[str, Any]:
    """Read ``made.json``, or begin anew where networks no longer fit; ConfigError if that needs ``retrain``."""
    out, names, trained, labels = work.folder, samples.class_names, _is_trained(work), _labels(samples)
    learned: dict[str, Any] = {
        "class_names": list(names),
        "photos": {file.image_id: file.image.stat().st_size for file in samples.files},
        "labels": {name: labels[name] for name in work.samples().image_ids},
        "corrected": {} if work.untrained or config.self_training.refine == "none" else dict(corrected),
    }
    record: dict[str, Any] = files.read_json(out / "made.json", {})
    before = record.get("learned", learned)
    changed = config_differences(config, load_config(out / "config.yaml")) if record else []
    if trained:
        changed += [f"class {name}" for name in names if name not in before["class_names"] and not work.untrained]
        changed += [f"photo {name}" for name in sorted(dict(before["photos"].items() ^ learned["photos"].items()))]
    if changed and work.path("checkpoints").is_dir() and not retrain:
        raise ConfigError(
            f"{out} was made with other settings, photos or classes: {'; '.join(changed[:5])}; choose another --out, "
            "or give --retrain (in Python retrain=True), which trains anew and keeps what you wrote"
        )
    if changed:
        print(f"{', '.join(changed[:5])}: everything is made anew")
    if changed or not record or (learned != before and (retrain or not trained)):
        for folder in filter(Path.is_dir, map(out.joinpath, MADE)):
            shutil.rmtree(folder)
        files.write_text(out / "config.yaml", dump_config(config))
        record = {"learned": learned, "photos": {}}
    record["learned"]["class_names"] = [*names]  # masks without training take new ones
    files.write_json(out / "made.json", record)
    return record


def _labels(samples: Samples) -> dict[str, list[str]]:
    return {file.image_id: [samples.class_names[number] for number in file.labels] for file in samples.files}


def _renew(
    work: Workspace,
    record: dict[str, Any],
    samples: Samples,
    corrections: Mapping[str, Correction],
    corrected: Mapping[str, str],
    network: str,
) -> None:
    """Write into ``made.json`` what a network's masks are made from, and delete those made from something else."""
    out = work.folder
    for name, labels in _labels(samples).items():
        correction, last = corrections.get(name, Correction()), record["photos"].get(name, {})
        new = {"labels": labels, "bg_score": correction.bg_score, "corrected": corrected.get(name), "network": network}
        depends = {
            work.maps("student").path(name): ["labels"],
            out / "made" / f"{name}.png": ["labels", "bg_score", "network"],
        }
        for path, causes in (depends | dict.fromkeys(_shown(out, name), list(new))).items():
            differs = any(new[cause] != last.get(cause) for cause in causes)
            if path.parent.name in SHOWN if correction.leave_out else differs:
                path.unlink(missing_ok=True)
        if not correction.leave_out and not new.items() <= last.items():
            record["photos"][name] = new
    files.write_json(out / "made.json", record)


def _shown(out: Path, image_id: str) -> tuple[Path, Path, Path]:
    """The mask of a photo, its overlay, and the overlay of what it was before the CRF or before a person's mask."""
    mask, overlay, before = (str(out / folder / image_id) for folder in SHOWN)
    return Path(f"{mask}.png"), Path(f"{overlay}.jpg"), Path(f"{before}.jpg")


def _write_overlays(work: Workspace, record: dict[str, Any], own: Mapping[str, float], network: str) -> None:
    """Write masks and overlays that are missing, and the signs of their photos into the record."""
    samples, chosen = work.samples(), work.mask_bg_score(network)
    maps, made, final = work.mask_maps(network, samples), work.masks(samples, "made"), work.masks(samples)
    single = [work.mask_maps(network, samples, [scale]) for scale in work.config.attention.scales]
    teacher = work.maps("student" if work.untrained else "teacher")
    drawn = {file.image_id: file.mask for file in work.corrected().files}
    for index, name in enumerate(progress(samples.image_ids, total=len(samples), desc="overlays")):
        path, *overlays = _shown(work.folder, name)
        if not path.is_file():
            save_mask(path, read_mask(drawn.get(name) or made.paths[index]))
        if "signs" in record["photos"][name] and all(overlay.is_file() for overlay in overlays):
            continue
        present, fused = maps.present(index)
        scales, score = [each.present(index)[1] for each in single], own.get(name, chosen)
        peaks = torch.stack([cam.amax(dim=(1, 2)) for cam in teacher.read(name)[0]]).sum(dim=0)[present].tolist()
        values = (present + 1).tolist()
        image, mask = samples[index].image, final[index]
        record["photos"][name]["signs"] = signs(fused, scales, score, mask, values, peaks)
        before = made[index] if name in drawn else hard_labels(maps[index], score)
        for overlay, labels in zip(overlays, (mask, before), strict=True):
            picture = Image.fromarray(overlay_mask(image, labels))
            picture.thumbnail((OVERLAY_SIDE, OVERLAY_SIDE))
            files.save_image(overlay, picture)


def write_sheet(work: Workspace, samples: Samples, record: dict[str, Any]) -> None:
    """Write ``masks.csv`` and the contact sheet: the most doubtful first, those left out last."""
    rows, cards = list[dict[str, Any]](), list[dict[str, Any]]()
    usual_peak = median([1e-6, *(sign[-1] for photo in record["photos"].values() for sign in photo.get("signs", ()))])
    for file in samples.files:
        name, left, mine = file.image_id, file.image_id in work.leave_out, list[dict[str, Any]]()
        drawn = not left and record["photos"][name]["corrected"]
        listed = [None] * len(file.labels) if left else record["photos"][name]["signs"]
        for number, sign in zip(file.labels, listed, strict=True):
            label = samples.class_names[number]
            row = {"image": file.image.name, "label": label, "number": number, "check": "left out"}
            if sign:
                trust, check = (1.0, "corrected by hand") if drawn else judge(label, Signs(*sign), usual_peak)
                row |= {"share": sign[0], "confidence": trust, "check": check}
            mine.append(row)
        doubt = min((row.get("confidence", 2.0) for row in mine), default=2.0)
        paths = [quote(path.relative_to(work.folder).as_posix()) for path in _shown(work.folder, name)]
        cards.append({"name": name, "rows": mine, "left": left, "drawn": drawn, "paths": paths, "doubt": doubt})
        rows += mine
    columns = ["image", "label", "share", "confidence", "check"]
    table = pd.DataFrame(rows, columns=columns).sort_values(["confidence", "image", "label"])
    files.write_text(work.path("masks.csv"), table.to_csv(index=False, float_format="%.3f", lineterminator="\n"))
    cards.sort(key=lambda card: (card["doubt"], card["name"]))
    legend = sorted({(row["number"] + 1, row["label"]) for row in rows})
    write_page(work.path("index.html"), "contact_sheet.html.j2", cards=cards, legend=legend, color=class_color)
