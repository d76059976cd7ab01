"""Masks of ``smaf masks`` in the explorer, the most doubtful first, to accept or correct; see notebook ``photos``."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import pandas as pd
import torch.nn.functional as F

from smaflib import files
from smaflib.apps.corrections import read_corrections, write_correction
from smaflib.apps.masks import open_masks
from smaflib.config import load_config
from smaflib.data.labels import check_class_names, image_stem, write_labels
from smaflib.explorer.state import Gallery, Settings
from smaflib.explorer.widget import Explorer


class MaskGallery(Gallery):
    """The photos of a folder of :func:`~smaflib.apps.masks.make_masks`, the most doubtful first, reviewed ones last."""

    def __init__(self, out: Path) -> None:
        self.work, self.decided = open_masks(out), read_corrections(out)
        samples, table = self.work.samples(), pd.read_csv(out / "masks.csv", dtype=str, na_filter=False)
        self.doubts: dict[str, list[str]] = {}
        for image, label, check in zip(table["image"], table["label"], table["check"], strict=True):
            self.doubts.setdefault(image_stem(image), []).extend([f"{label}: {check}"] if check else [])
        order = {name: rank for rank, name in enumerate(self.doubts)}
        ids = sorted(samples.image_ids, key=lambda name: (name in self.decided, order.get(name, len(order))))
        images = [samples[samples.image_ids.index(name)] for name in ids]
        maps = {"student": self.work.maps("student")}
        super().__init__(images, samples.class_names, self.work.config, {}, maps, self.work.mask_bg_score(), out.name)
        self.allowed = [*load_config(out / "config.yaml").data.class_names]  # labels; if empty, all
        self.made: list[str] = files.read_json(out / "made.json", {})["learned"]["class_names"]

    def numbers(self, index: int, names: Sequence[str]) -> tuple[int, ...]:
        check_class_names(names)
        self.class_names = tuple(dict.fromkeys([*self.class_names, *names]))  # a new one becomes a class
        return super().numbers(index, names)

    def cams(self, index: int, role: str, flip: bool) -> list[Any]:
        missing = len(self.class_names) - len(self.made)  # a new class has no map
        return [F.pad(cam, (0, 0, 0, 0, 0, missing)) for cam in super().cams(index, role, flip)]

    def first_settings(self, index: int) -> Settings:
        correction = self.decided.get(self.samples[index].image_id)
        first = super().first_settings(index)
        return first if correction is None or not correction.bg_score else replace(first, bg_score=correction.bg_score)


class Review(Explorer):
    """The explorer on a folder of masks.

    *accept* (Enter in the panels) keeps the image label and the background threshold that are set, in the table of
    labels and in ``corrections.csv``, and shows the next photo; *leave out* (Delete) drops the photo. The next call of
    :func:`~smaflib.apps.masks.make_masks` applies both.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out).absolute()
        self.doubt = widgets.HTML(layout={"margin": "0 12px"})
        super().__init__(MaskGallery(self.out))
        decide, buttons = self._reporting(self.decide), []
        made = {"Enter": ("accept ▶", "keep label and threshold"), "Delete": ("leave out", "no mask of this photo")}
        for key, (text, what) in made.items():
            tooltip = f"{what}; next ({key} in the panels)"
            buttons.append(widgets.Button(description=text, tooltip=tooltip, layout={"width": "auto"}))
            buttons[-1].on_click(lambda button, key=key: decide(key))
        # A key that was pressed before its photo was shown was meant for the one before.
        self.board.on_msg(lambda board, sent, buffers: decide(sent[0]) if sent[1] == board.index else None)
        self.children[0].children = [widgets.HBox([*buttons, self.doubt], layout={"align_items": "center"})]  # not tabs
        self.add_class("smaf-review")
        self.controls["crf"].value = self._first["crf"] = self.gallery.config.pseudo_masks.refine == "crf"
        self.controls["upload"].layout.display = "none"  # another photo has no mask here

    def _open(self, index: int, keep_class: bool = True) -> None:
        super()._open(index, keep_class)
        gallery: Any = self.gallery
        image_id = gallery.samples[index].image_id
        with self._without_redraw():
            self.controls["bg_score"].value = gallery.first_settings(index).bg_score
            self.controls["image_label"].allowed_tags = gallery.allowed
        self.doubt.value = html.escape(" · ".join([image_id, *gallery.doubts.get(image_id, [])]))

    def decide(self, key: str) -> None:
        """Store what is set for the photo, accepted (``Enter``) or left out (``Delete``), and show the next one."""
        gallery: Any = self.gallery
        index, settings = self.board.index, self.settings
        sample, usual = gallery.samples[index], gallery.bg_score
        if key == "Enter" and settings.image_label != gallery.first_settings(index).image_label:
            names = [gallery.class_names[number] for number in settings.image_label]
            write_labels(gallery.config.data.labels, sample.image_id, names)
            label = sample.image_label.new_zeros(len(gallery.class_names))
            label[list(settings.image_label)] = 1
            gallery.samples[index] = replace(sample, image_label=label)
        # The slider rounds; a threshold that was not moved stays the one for all photos.
        own = None if math.isclose(settings.bg_score, usual, abs_tol=0.005) else settings.bg_score
        write_correction(self.out, sample.image_id, own, leave_out=key == "Delete")
        gallery.decided = read_corrections(self.out)
        reviewed = sum(each.image_id in gallery.decided for each in gallery.samples)
        done = f"{sample.image_id}: {'accepted' if key == 'Enter' else 'left out'}"
        new = [name for name in self.controls["image_label"].value if key == "Enter" and name not in gallery.made]
        trained = (self.out / "checkpoints").is_dir()
        learn = f"; a new class ({', '.join(new)}) needs make_masks(..., retrain=True)" if new and trained else ""
        self._go(index + 1, f"{done}; {reviewed} of {len(gallery.samples)} reviewed{learn}")
