"""The numbers that the explorer shows: one image from its attention maps to its mask, under settings that can change.

:class:`Gallery` holds images and their attention maps; :func:`explore` turns one image's maps and :class:`Settings`
into an :class:`Exploration`. :mod:`smaflib.explorer.widget` shows it in JupyterLab, :mod:`smaflib.explorer.page` on a
page that needs no kernel.
"""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from skimage.data import data_dir
from torch import Tensor

from minidata import make_mini
from smaflib.cams import at_size, multi_scale_cams
from smaflib.classifier import predict_label
from smaflib.config import Config, CrfConfig, EvaluationConfig, FusionRule, PseudoMaskConfig
from smaflib.data import Sample, load_samples
from smaflib.data.labels import IMAGE_ENDINGS
from smaflib.data.voc import list_files, open_image
from smaflib.errors import DataError, RunError
from smaflib.evaluation import confusion_matrix, intersection_over_union, sweep_thresholds
from smaflib.files import shown_path
from smaflib.maps import AttentionMaps, fuse_and_denoise
from smaflib.models.pretrained import ROLES, UNSEEN_SEED, pretrained_config, pretrained_network
from smaflib.pseudo_masks import pseudo_mask
from smaflib.reactivation import reactivate
from smaflib.runs import Run, find_run
from smaflib.runtime import Runtime
from smaflib.sources.imagenet import LIKELY, ImageNetClassifier, imagenet_config, synonyms

CURVE_SCORES: tuple[float, ...] = tuple(round(0.02 * step, 2) for step in range(1, 50))  #: Background thresholds.

LIKELIEST_CLASSES = 5  # of ImageNet's that are offered for a photo; the others can be searched
THUMBNAIL_SIDE = 96  # in pixels, the longest

PHOTOS = ("chelsea.png", "coffee.png", "camera.png", "rocket.jpg", "astronaut.png")
"""Photos inside scikit-image's wheel. Its documentation calls each of them CC0 or free of known restrictions."""

COLOR_TABLE = (matplotlib.colormaps["inferno"](np.arange(256))[:, :3] * 255).round().astype(np.uint8).tobytes()
"""256 RGB colours of rising lightness, three bytes each: those of maps in all figures."""

ABOUT_DRAWN = "A controlled experiment, synthetic on purpose: code drew these images, so each pixel's class is known."
ABOUT_PHOTOS = "The network learned to name photos from names alone, never where things are. No ground truth here."


def data_url(image: Tensor, side: int | None = None, kind: str = "JPEG") -> str:
    """An image, uint8 (3 or 1, H, W), as a ``data:`` URL; ``side`` limits its longest side, in pixels."""
    picture = Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy())
    if side:
        picture.thumbnail((side, side))
    content = io.BytesIO()
    picture.save(content, kind, quality=88)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"


def to_bytes(values: Tensor) -> bytes:
    """A map in [0, 1] as one byte per pixel, 255 for 1; uint8 labels unchanged."""
    if values.dtype != torch.uint8:
        values = (values.clamp(0, 1) * 255).round().to(torch.uint8)
    return values.contiguous().numpy().tobytes()


@dataclass(frozen=True)
class Settings:
    """Everything that leads from an image's attention maps to its mask."""

    class_number: int  # whose maps are shown, 0 to K-1
    image_label: tuple[int, ...]  # class numbers that denoising keeps
    weights: tuple[float, ...]  # of each scale in the fusion; 0 leaves it out
    fusion: FusionRule = "sum"
    bg_score: float = 0.2  # background threshold, in (0, 1]
    denoise: bool = True
    reactivate: bool = True
    crf: CrfConfig | None = None  # None: no CRF
    min_part: float = 0.0  # after the CRF, as in pseudo_masks.min_part


@dataclass(frozen=True)
class Exploration:
    """One image under one setting."""

    settings: Settings
    scales: tuple[float, ...]  # S of them
    scale_maps: Tensor  # (S, H, W) in [0, 1]: the shown class at each scale, each with a peak of 1
    denoised: Tensor  # (K, H, W) in [0, 1]: fused and, if set, denoised
    target: Tensor  # (H, W) in [0, 1]: the shown class, reactivated if set
    mask: Tensor  # uint8 (H, W), refined by the CRF if set
    ground_truth: Tensor | None  # uint8 (H, W), 255 is void; None if unknown

    @property
    def fused(self) -> Tensor:
        """(H, W): the fused map of the shown class."""
        return self.denoised[self.settings.class_number]

    @cached_property
    def iou(self) -> Tensor | None:
        """(K+1,) IoU of the mask, background first; nan for labels in neither mask nor ground truth."""
        if self.ground_truth is None:
            return None
        return intersection_over_union(confusion_matrix(self.mask, self.ground_truth, len(self.denoised)))

    @property
    def miou(self) -> float:
        """Mean IoU over the labels of mask and ground truth; nan without ground truth."""
        return float("nan") if self.iou is None else float(self.iou.nanmean())

    def iou_curve(self) -> Tensor | None:
        """(T, K+1) IoU of the mask without a CRF at each of the T :data:`CURVE_SCORES`; None without ground truth."""
        if self.ground_truth is None:
            return None
        names, config = [""] * len(self.denoised), EvaluationConfig(thresholds=CURVE_SCORES)
        swept = sweep_thresholds([self.denoised], [self.ground_truth], names, config)
        return torch.stack([scores.iou for scores in swept.values()])

    def read(self, row: int, col: int) -> dict[str, float]:
        """Scores of the shown class at a pixel, in [0, 1]: each scale, the fused map, the target."""
        maps = {f"scale {scale:g}": cam for scale, cam in zip(self.scales, self.scale_maps, strict=True)}
        maps |= {"fused": self.fused, "target": self.target}
        return {name: float(values[row, col]) for name, values in maps.items()}


def explore(sample: Sample, cams: Sequence[Tensor], scales: Sequence[float], settings: Settings) -> Exploration:
    """Take one image's maps, per scale (K, h_s, w_s) and non-negative, to its mask; ValueError if every weight is 0.

    The label of the sample is ignored in favour of ``settings.image_label``.
    """
    size, number = (sample.image.shape[-2], sample.image.shape[-1]), settings.class_number
    used = [each for each in zip(cams, scales, settings.weights, strict=True) if each[2]]
    if not used:
        raise ValueError("no scale takes part in the fusion; switch at least one on")
    used_cams, used_scales, weights = zip(*used, strict=True)
    kept = torch.full((len(cams[0]),), float(not settings.denoise))
    kept[list(settings.image_label)] = 1
    denoised = fuse_and_denoise(used_cams, size, kept, settings.fusion, used_scales, weights)
    plain = PseudoMaskConfig(refine="none")
    refinement = PseudoMaskConfig(crf=settings.crf, min_part=settings.min_part) if settings.crf else plain
    mask = pseudo_mask(sample.image, denoised, settings.bg_score, refinement)
    target = reactivate(denoised, settings.bg_score)[1 + number] if settings.reactivate else denoised[number]
    scale_maps = torch.stack([at_size(cam[number], size) for cam in cams])
    return Exploration(settings, tuple(scales), scale_maps, denoised, target, mask, sample.mask)


@dataclass(eq=False)
class Gallery:
    """Images and their attention maps by teacher and student; maps are computed or read once."""

    samples: list[Sample]
    class_names: tuple[str, ...]
    config: Config  # first values of the settings
    networks: dict[str, Any]  # by role; may be empty
    stored: dict[str, AttentionMaps] = field(default_factory=dict)  # finished maps, preferred over the networks
    bg_score: float | None = None  # first background threshold; None: that of the config
    title: str = "images"
    about: str = ""  # what the reader should know about these images
    knows_photos: bool = True  # whether the networks recognise photos, so that others may be added
    _cams: dict[tuple[Any, ...], list[Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def pretrained(cls, num_images: int = 8, seed: int = UNSEEN_SEED) -> Gallery:
        """The networks that come with the package, and newly drawn images that they were not trained on."""
        config = pretrained_config()
        with tempfile.TemporaryDirectory() as folder:
            make_mini(Path(folder), num_images, 1, size=config.data.image_size, seed=seed)
            data = config.data.model_copy(update={"root": Path(folder)})
            samples = load_samples(config.model_copy(update={"data": data}), "train").with_ground_truth()
            images = list(samples)
        networks: dict[str, Any] = {role: pretrained_network(role) for role in ROLES}
        facts: dict[str, Any] = {"title": "drawn set", "about": ABOUT_DRAWN, "knows_photos": False}
        return cls(images, samples.class_names, config, networks, **facts)

    @staticmethod
    def photos(files: str | Path | Iterable[str | Path] | None = None) -> PhotoGallery:
        """Photos under ImageNet's classifier: some files, all of a folder, or by default those of :data:`PHOTOS`.

        DataError if the folder has no photo, or one cannot be read.
        """
        if files is None:
            files = [Path(data_dir, name) for name in PHOTOS]
        elif isinstance(files, str | Path):
            file = Path(files)
            files = [file] if file.is_file() else list_files(file, IMAGE_ENDINGS, "name a folder of photos")
        gallery = PhotoGallery()
        for file in map(Path, files):
            gallery.add_photo(file.name, file.read_bytes())
        return gallery

    @classmethod
    def of_run(cls, run: Run | str | Path, num_images: int = 8) -> Gallery:
        """The first images of a run, those with ground truth if there are any, with its maps and networks.

        RunError if there is no such run, or it has no maps and no teacher yet; DataError if its data cannot be read.
        """
        run = run if isinstance(run, Run) else find_run(str(run))
        split = run.samples("train")
        samples = list(split.examples(num_images))
        networks: dict[str, Any] = {role: run.source(role) for role in ROLES if run.checkpoint(role).is_file()}
        maps: dict[str, AttentionMaps] = {role: run.maps(role) for role in ROLES}
        stored = {role: each for role, each in maps.items() if all(each.path(s.image_id).is_file() for s in samples)}
        if not networks and not stored:
            raise RunError(
                f"the run {shown_path(run.folder)} has no teacher and no attention maps yet. "
                f"This command makes them:\n  {run.command('--until', 'multi_scale_attention')}"
            )
        try:
            bg_score = run.bg_score
        except DataError:  # "auto", before stage 03 has written the maps
            bg_score = None
        return cls(samples, split.class_names, run.config, networks, stored, bg_score, f"run {run.name}")

    @property
    def scales(self) -> tuple[float, ...]:
        return self.config.attention.scales

    @property
    def roles(self) -> tuple[str, ...]:
        """Networks whose maps are available."""
        return tuple(role for role in ROLES if role in self.stored or role in self.networks)

    def names(self, index: int) -> tuple[str, ...]:
        return self.class_names

    def numbers(self, index: int, names: Sequence[str]) -> tuple[int, ...]:
        """Class numbers of an image label, ascending."""
        return tuple(sorted(map(self.names(index).index, names)))

    def probabilities(self, index: int) -> list[tuple[str, float]]:
        """Name and probability of an image's likeliest classes, where the network knows probabilities."""
        return []

    def first_settings(self, index: int) -> Settings:
        """The run's settings for an image: its label and the first class of it, all scales alike, no CRF."""
        self.names(index)  # a photo gets its label when it is recognised
        numbers, attention = tuple(self.samples[index].image_label.nonzero()[:, 0].tolist()), self.config.attention
        chosen = self.bg_score or attention.bg_score
        bg_score = 0.2 if chosen == "auto" else max(chosen, 0.01)  # a few images cannot tell what auto would choose
        weights = (1.0,) * len(self.scales)
        return Settings(numbers[0] if numbers else 0, numbers, weights, attention.fusion, bg_score)

    def flips(self, role: str) -> tuple[bool, ...]:
        """Which maps are available: with the mirror image, without, or both."""
        return (True, False) if role in self.networks else (self.config.attention.flip,)

    def cams(self, index: int, role: str, flip: bool) -> list[Tensor]:
        """Per scale (K, h_s, w_s), with ``flip`` the mean of both mirror images; DataError if there are none."""
        key = (index, role, flip)
        if key not in self._cams:
            sample, attention = self.samples[index], self.config.attention
            stored = self.stored.get(role) if flip == attention.flip else None
            if stored and stored.path(sample.image_id).is_file():  # an added photo has none
                self._cams[key], _ = stored.read(sample.image_id)
            elif role in self.networks:
                views = (self.networks[role], sample.image, self.scales, flip)
                classes, refined = sample.image_label.nonzero()[:, 0].tolist(), (attention.caa, attention.correlation)
                self._cams[key] = multi_scale_cams(*views, Runtime(), classes, *refined)
            else:
                raise DataError(f"there are no such maps of {sample.image_id}, and the {role} network is missing")
        return self._cams[key]

    def explore(self, index: int, role: str, settings: Settings, flip: bool | None = None) -> Exploration:
        """:func:`explore` an image; ``flip`` defaults to the run's setting."""
        flip = self.config.attention.flip if flip is None else flip
        return explore(self.samples[index], self.cams(index, role, flip), self.scales, settings)

    def add_photo(self, name: str, content: bytes) -> int:
        """Add an encoded picture, shrunk to 512 pixels, with the label that the first network predicts; its index.

        DataError if the picture cannot be read, or there is no network to compute its maps.
        """
        if not self.networks:
            raise DataError("a photo needs a network to compute its maps, and this run has kept none")
        image = open_image(name, content=content)
        source, label = next(iter(self.networks.values())), torch.zeros(len(self.class_names))
        network = getattr(source, "network", source)
        if hasattr(network, "image_logits"):  # a source without a classifier of these classes predicts nothing
            label = predict_label(network.eval(), image, self.config)
        self.samples.append(Sample(name, image, label))  # with its ending, which no image of a run has
        return len(self.samples) - 1


class PhotoGallery(Gallery):
    """Photos under ImageNet's classifier; each offers its likeliest classes and those that were searched.

    A photo is recognised when it is first looked at, so that a folder of many opens quickly.
    """

    def __init__(self) -> None:
        self.network, config = ImageNetClassifier(), imagenet_config()
        networks = {"teacher": self.network}
        super().__init__([], self.network.class_names, config, networks, title="photos", about=ABOUT_PHOTOS)
        self._classes: dict[int, list[int]] = {}  # by index: ImageNet's numbers of the classes that are offered
        self._found: dict[int, Tensor] = {}  # by index: (1000,) probabilities

    def add_photo(self, name: str, content: bytes) -> int:
        self.samples.append(Sample(Path(name).stem, open_image(name, content=content), torch.zeros(0)))
        return len(self.samples) - 1

    def names(self, index: int) -> tuple[str, ...]:
        names = [self.class_names[number] for number in self._recognise(index)]
        return tuple(f"{name} 2" if name in names[:n] else name for n, name in enumerate(names))  # two are maillots

    def probabilities(self, index: int) -> list[tuple[str, float]]:
        likeliest = self._recognise(index)[:LIKELIEST_CLASSES]
        return [(self.class_names[number], float(self._found[index][number])) for number in likeliest]

    def cams(self, index: int, role: str, flip: bool) -> list[Tensor]:
        key, classes = (index, role, flip), self._recognise(index)
        if key not in self._cams:
            cams = multi_scale_cams(self.network, self.samples[index].image, self.scales, flip)
            self._cams[key] = [cam.half() for cam in cams]  # of all classes; half, for memory
        return [cam[classes].float() for cam in self._cams[key]]

    def add_class(self, index: int, text: str) -> int:
        """Put a class into a photo's label: the likeliest of those with this name, else with a name that contains it.

        Returns its number in this photo, or raises a ValueError if there is none.
        """
        wanted, known = text.casefold().strip(), [names.casefold() for names in synonyms()]
        found = [number for number, names in enumerate(known) if wanted in (names, *names.split(", "))]
        found = found or [number for number, names in enumerate(known) if wanted in names]
        if not found:
            raise ValueError(f"none of the {len(known)} classes has a name with {text!r}")
        classes, sample = self._recognise(index), self.samples[index]
        best = max(found, key=lambda number: float(self._found[index][number]))
        if best not in classes:
            classes.append(best)
        label = F.pad(sample.image_label, (0, len(classes) - len(sample.image_label)))
        label[classes.index(best)] = 1
        self.samples[index] = replace(sample, image_label=label)
        return classes.index(best)

    def _recognise(self, index: int) -> list[int]:
        """The numbers of a photo's classes; the image label are those above :data:`LIKELY`, maybe none."""
        if index not in self._classes:
            probabilities = self._found[index] = self.network.probabilities(self.samples[index].image)
            values, likeliest = probabilities.topk(LIKELIEST_CLASSES)
            self._classes[index] = likeliest.tolist()
            self.samples[index] = replace(self.samples[index], image_label=(values > LIKELY).float())
        return self._classes[index]
