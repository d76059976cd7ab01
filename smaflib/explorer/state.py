"""What the explorer shows, as numbers: one image's maps from scale to mask, under settings that can be changed at once.

No widget in here. :class:`Gallery` holds images and their attention maps, which are computed once; :func:`explore`
turns one image's maps and a :class:`Settings` into an :class:`Exploration`. :mod:`smaflib.explorer.widget` shows it in
JupyterLab, :mod:`smaflib.explorer.page` as a page that needs no kernel.
"""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from minidata.dataset import make_mini
from smaflib.cams import FUSIONS, at_size, fuse_cams, multi_scale_cams, source_of
from smaflib.classifier import classify_image, learned_views, predict_labels
from smaflib.config import Config, CrfConfig, EvaluationConfig, FusionRule, PseudoMaskConfig
from smaflib.data import Sample, load_samples
from smaflib.data.masks import open_picture
from smaflib.errors import DataError, MissingStage, RunError
from smaflib.evaluation import confusion_matrix, intersection_over_union, mean_over_classes, sweep_thresholds
from smaflib.files import display_path
from smaflib.maps import AttentionMaps, fuse_and_denoise
from smaflib.models.imagenet import ImageNetClassifier, imagenet_config
from smaflib.models.networks import AttentionNetwork
from smaflib.models.pretrained import ROLES, UNSEEN_SEED, Role, pretrained_config, pretrained_network
from smaflib.pseudo_masks import pseudo_mask
from smaflib.reactivation import hard_labels, reactivate
from smaflib.runs import Run, find_run
from smaflib.runtime import Runtime, device_of

CURVE_SCORES: tuple[float, ...] = tuple(round(0.02 * step, 2) for step in range(1, 50))
"""Background scores at which the curve of the IoU is drawn."""

LIKELIEST_CLASSES = 5
"""Of ImageNet's thousand, the classes of a photo that can be chosen in the explorer."""

PHOTO_SIDE = 384
"""Longest side, in pixels, to which a custom image is shrunk: all scales of it in a few seconds on a CPU."""

COLOR_MAPS: tuple[str, ...] = ("inferno", "viridis", "cividis", "magma", "gray")
"""Those of matplotlib that rise in lightness all along, so that they read the same for colour-blind readers."""

THUMBNAIL_SIDE = 96


def color_table(name: str) -> bytes:
    """256 RGB colours of one of :data:`COLOR_MAPS`, three bytes each."""
    colors = matplotlib.colormaps[name](np.arange(256))[:, :3]
    return bytes((colors * 255).round().astype(np.uint8))


def picture_address(image: Tensor, side: int | None = None, ending: str = "JPEG") -> str:
    """A picture inside a web address, to stand in a page that loads nothing.

    Args:
        image: uint8 (3, H, W).
        side: its longest side shrinks to that, in pixels.
        ending: JPEG or PNG.
    """
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    if side:
        picture.thumbnail((side, side))
    content = io.BytesIO()
    picture.save(content, ending, quality=88)
    return f"data:image/{ending.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"


def rule_title(rule: str) -> str:
    """What people read of a fusion rule: ``size-adaptive``; of somebody's own its name as it is."""
    return rule.replace("_", "-") if rule in FUSIONS else rule


def to_bytes(values: Tensor) -> bytes:
    """A map in [0, 1] as a byte per pixel, 255 for 1; a mask's labels as they are."""
    if values.dtype != torch.uint8:
        values = (values.clamp(0, 1) * 255).round().to(torch.uint8)
    return values.contiguous().numpy().tobytes()


# ------------------------------------------------------------------------------------------------------------- numbers


@dataclass(frozen=True)
class Settings:
    """What can be changed in the explorer, but for the choice of image, network and flip: those choose the maps.

    Attributes:
        class_number: the class whose maps are shown, 0 to K-1.
        image_label: class numbers that denoising keeps.
        weights: of each scale in the fusion; 0: it takes no part.
        fusion: the rule.
        bg_score: the background's score, in (0, 1].
        denoise: erase the maps of classes that are not in ``image_label``.
        reactivate: divide each pixel by its strongest score.
        crf: refine the mask; None: do not.
    """

    class_number: int
    image_label: tuple[int, ...]
    weights: tuple[float, ...]
    fusion: FusionRule = "sum"
    bg_score: float = 0.2
    denoise: bool = True
    reactivate: bool = True
    crf: CrfConfig | None = None


@dataclass(frozen=True)
class Curve:
    """IoU over the background score, of the masks before the CRF.

    Attributes:
        scores: background scores.
        shown: IoU of the class shown, per score; nan where neither ground truth nor mask holds it.
        mean: mean IoU over the labels of ground truth and mask, per score.
    """

    scores: tuple[float, ...]
    shown: tuple[float, ...]
    mean: tuple[float, ...]


@dataclass(frozen=True)
class Reading:
    """What one pixel says about the class shown.

    Attributes:
        values: by name, in [0, 1]: each scale (as a share of that scale's peak), the fused map, the target.
        label: of the mask, 0 is background.
        ground_truth: the true label, 255 is void; None if there is no ground truth.
    """

    values: dict[str, float]
    label: int
    ground_truth: int | None


@dataclass(frozen=True)
class Exploration:
    """One image under one setting.

    Attributes:
        settings: that it was made with.
        scales: of ``scale_maps``.
        scale_maps: (S, H, W) in [0, 1], the class shown at each scale, each with its peak at 1.
        denoised: (K, H, W) in [0, 1], fused and, if so set, denoised.
        target: (H, W) in [0, 1], the class shown after reactivation, or ``denoised`` of it without.
        labels: uint8 (H, W), the mask before the CRF.
        mask: uint8 (H, W), the mask: after the CRF, if so set.
        ground_truth: uint8 (H, W), 255 is void; None: unknown.
    """

    settings: Settings
    scales: tuple[float, ...]
    scale_maps: Tensor
    denoised: Tensor
    target: Tensor
    labels: Tensor
    mask: Tensor
    ground_truth: Tensor | None

    @property
    def fused(self) -> Tensor:
        """(H, W): the fused map of the class shown."""
        return self.denoised[self.settings.class_number]

    @cached_property
    def iou(self) -> Tensor | None:
        """(K+1,) IoU of the mask in [0, 1], background first; nan for what is in neither mask nor ground truth."""
        return None if self.ground_truth is None else _iou(self.mask, self.ground_truth, len(self.denoised))

    @cached_property
    def iou_before_crf(self) -> Tensor | None:
        """As ``iou``, of ``labels``: what the curve over the background score has at this point."""
        if self.ground_truth is None or self.labels is self.mask:
            return self.iou
        return _iou(self.labels, self.ground_truth, len(self.denoised))

    @property
    def miou(self) -> float:
        """Mean IoU over the labels of mask and ground truth; nan without ground truth."""
        return float("nan") if self.iou is None else mean_over_classes(self.iou)

    def read(self, row: int, col: int) -> Reading:
        """The values of one pixel.

        Raises:
            IndexError: if it lies outside of the image.
        """
        height, width = self.labels.shape
        if not (0 <= row < height and 0 <= col < width):
            raise IndexError(f"there is no pixel ({row}, {col}) in an image of {height} x {width} pixels")
        maps = dict(zip((f"scale {scale:g}" for scale in self.scales), self.scale_maps, strict=True))
        maps |= {"fused": self.fused, "target": self.target}
        values = {name: float(values[row, col]) for name, values in maps.items()}
        return Reading(
            values, int(self.mask[row, col]), None if self.ground_truth is None else int(self.ground_truth[row, col])
        )


def explore(sample: Sample, cams: Sequence[Tensor], scales: Sequence[float], settings: Settings) -> Exploration:
    """One image's maps under some settings.

    Args:
        sample: image and, if known, ground truth.
        cams: per scale (K, h_s, w_s), non-negative, flips already undone.
        scales: of the maps.
        settings: what to do with them; ``settings.image_label`` counts, the sample's own does not.

    Raises:
        ValueError: if no scale takes part, or the settings do not fit the maps.
    """
    return with_mask(sample, fused_under(sample, cams, scales, settings), scales, settings)


@dataclass(frozen=True)
class Fused:
    """The part of an :class:`Exploration` that the background score does not change: it can be kept while it moves.

    Attributes:
        scale_maps: (S, H, W) in [0, 1], the class shown at each scale.
        denoised: (K, H, W) in [0, 1].
        numbers: of the classes whose maps in ``denoised`` can be other than zero.
    """

    scale_maps: Tensor
    denoised: Tensor
    numbers: tuple[int, ...]


def fused_under(sample: Sample, cams: Sequence[Tensor], scales: Sequence[float], settings: Settings) -> Fused:
    """The maps of the class shown at each scale, and all classes fused and denoised; arguments as :func:`explore`."""
    size, num_classes = _size(sample), len(cams[0])
    scale_maps = torch.stack([at_size(cam[settings.class_number], size) for cam in cams])
    chosen = [(cam, scale, weight) for cam, scale, weight in zip(cams, scales, settings.weights, strict=True) if weight]
    if not chosen:
        raise ValueError("no scale takes part in the fusion; switch at least one on")
    parts, kept_scales, weights = zip(*chosen, strict=True)
    if not settings.denoise:
        fused = fuse_cams(parts, size, settings.fusion, kept_scales, weights)
        return Fused(scale_maps, fused, tuple(range(num_classes)))
    image_label = torch.zeros(num_classes)
    image_label[list(settings.image_label)] = 1
    denoised = fuse_and_denoise(parts, size, image_label, settings.fusion, kept_scales, weights)
    return Fused(scale_maps, denoised, tuple(sorted(settings.image_label)))


def with_mask(sample: Sample, fused: Fused, scales: Sequence[float], settings: Settings) -> Exploration:
    """Target and mask of maps that are fused already; arguments as :func:`explore`."""
    denoised, bg_score, shown_class = fused.denoised, settings.bg_score, settings.class_number
    target, numbers = denoised[shown_class], list(fused.numbers)
    # Classes without a map win nowhere and change no maximum: of eighty, one or two are left.
    some = denoised[numbers or [shown_class]]
    if settings.reactivate and shown_class in numbers:
        target = reactivate(some, bg_score)[1 + numbers.index(shown_class)]
    label_of = torch.tensor([0, *(number + 1 for number in numbers or [shown_class])], dtype=torch.uint8)
    labels = label_of[hard_labels(some, bg_score).long()]
    mask = (
        labels
        if settings.crf is None
        else pseudo_mask(sample.image, denoised, bg_score, PseudoMaskConfig(crf=settings.crf))
    )
    return Exploration(settings, tuple(scales), fused.scale_maps, denoised, target, labels, mask, sample.mask)


def iou_curve(result: Exploration) -> Curve | None:
    """IoU over the background score, of the masks before the CRF; None without ground truth.

    It does not depend on the background score, reactivation or CRF of the settings.
    """
    if result.ground_truth is None:
        return None
    index, names = result.settings.class_number + 1, [str(number) for number in range(len(result.denoised))]
    swept = sweep_thresholds([result.denoised], [result.ground_truth], names, EvaluationConfig(thresholds=CURVE_SCORES))
    ious = [scores.iou for scores in swept.values()]
    return Curve(
        CURVE_SCORES,
        tuple(float(iou[index]) for iou in ious),
        tuple(mean_over_classes(iou) for iou in ious),
    )


def _iou(mask: Tensor, ground_truth: Tensor, num_classes: int) -> Tensor:
    return intersection_over_union(confusion_matrix(mask, ground_truth, num_classes))


def _size(sample: Sample) -> tuple[int, int]:
    return (sample.image.shape[-2], sample.image.shape[-1])


# ------------------------------------------------------------------------------------------------ images and their maps


@dataclass
class Gallery:
    """Images, and their attention maps by teacher and student, each computed or read once.

    Attributes:
        samples: the images, with their ground truth where it is known.
        class_names: the K classes.
        config: scales, fusion rule, background score and CRF to begin with.
        networks: that compute maps; may lack one or both.
        stored: folders of finished maps, which go before the networks.
        source: where the images come from, in words.
        bg_score: the background's score to begin with; None: the config's, and the paper's where that is ``auto``.
        knows_photos: whether the networks can make sense of a photo; see :meth:`for_photos`.
    """

    samples: list[Sample]
    class_names: tuple[str, ...]
    config: Config
    networks: dict[Role, AttentionNetwork | ImageNetClassifier]
    stored: dict[Role, AttentionMaps] = field(default_factory=dict)
    source: str = ""
    bg_score: float | None = None
    knows_photos: bool = True
    _cams: dict[tuple[int, Role, bool], list[Tensor]] = field(default_factory=dict, repr=False)
    _photos: set[int] = field(default_factory=set, repr=False)

    @classmethod
    def pretrained(cls, num_images: int = 8, seed: int = UNSEEN_SEED) -> Gallery:
        """The networks that come with the package, and mini images that none was trained on, drawn on the spot."""
        config = pretrained_config()
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "data"
            make_mini(root, num_images, 1, size=config.data.image_size, seed=seed)
            data = config.data.model_copy(update={"root": root})
            samples = load_samples(config.model_copy(update={"data": data}), "train").with_masks()
            images, class_names = list(samples), samples.class_names
        networks: dict[Role, AttentionNetwork | ImageNetClassifier] = {role: pretrained_network(role) for role in ROLES}
        source = "pretrained networks, images drawn on the spot"
        return cls(images, class_names, config, networks, source=source, knows_photos=False)

    @classmethod
    def imagenet(cls) -> Gallery:
        """ImageNet's classifier, for custom images (:meth:`add_photo`); it has no images and no classes to begin with.

        Raises:
            ConfigError: if the package that holds its weights is not installed.
        """
        return cls([], (), imagenet_config(), {"teacher": ImageNetClassifier()}, source="ImageNet's network")

    def for_photos(self) -> Gallery:
        """The gallery that a custom image belongs into: this one, or where its networks know drawings only, another."""
        return self if self.knows_photos else Gallery.imagenet()

    @classmethod
    def of_run(cls, run: Run | str | Path, num_images: int = 8) -> Gallery:
        """The first images of a run (those with ground truth, if there are any) and the maps or networks that it made.

        Raises:
            RunError: if it is no run, or has neither attention maps nor a teacher yet.
            DataError: if its data or maps cannot be read.
        """
        run = run if isinstance(run, Run) else find_run(str(run))
        split = run.samples("train")
        networks: dict[Role, AttentionNetwork | ImageNetClassifier] = {}
        stored: dict[Role, AttentionMaps] = {}
        samples = list(split.shown(num_images))
        for role in ROLES:
            maps = run.maps(role)
            if run.checkpoint(role).is_file():
                networks[role] = run.network(role)
            if all(maps.path(sample.image_id).is_file() for sample in samples):
                stored[role] = maps
        if not networks and not stored:
            raise RunError(
                f"the run {display_path(run.folder)} has no teacher and no attention maps yet. "
                f"This command makes them:\n"
                f"  {run.command('--until', 'multi_scale_attention')}"
            )
        try:
            bg_score = run.bg_score
        except MissingStage:  # auto, which stage 03 resolves
            bg_score = None
        return cls(samples, split.class_names, run.config, networks, stored, f"run {run.name}", bg_score)

    @property
    def scales(self) -> tuple[float, ...]:
        return self.config.attention.scales

    @property
    def roles(self) -> tuple[Role, ...]:
        """Teacher, student or both: of which there are maps."""
        return tuple(role for role in ROLES if role in self.networks or role in self.stored)

    def first_settings(self, index: int) -> Settings:
        """The run's own settings for an image: its image label, the first class of it, all scales alike, no CRF."""
        numbers = tuple(torch.nonzero(self.samples[index].image_label)[:, 0].tolist())
        own = self.config.attention.bg_score
        # auto is chosen from all maps of a run, which a few images cannot tell; then the paper's value to begin with.
        bg_score = self.bg_score or (0.2 if own == "auto" else own)
        return Settings(
            class_number=numbers[0] if numbers else 0,
            image_label=numbers,
            weights=(1.0,) * len(self.scales),
            fusion=self.config.attention.fusion,
            bg_score=min(max(bg_score, 0.01), 1.0),
        )

    def flips(self, index: int, role: Role) -> tuple[bool, ...]:
        """Whether maps with and without a view of the mirror image can be had."""
        if role in self.networks:
            return (True, False)
        return (self.config.attention.flip,) if self._is_stored(index, role, self.config.attention.flip) else ()

    def cams(self, index: int, role: Role, flip: bool) -> list[Tensor]:
        """Per scale (K, h_s, w_s); with ``flip`` the mean with those of the mirror image.

        Raises:
            DataError: if neither the run's files nor a network can give them.
        """
        key = (index, role, flip)
        if key not in self._cams:
            sample = self.samples[index]
            if self._is_stored(index, role, flip):
                self._cams[key], _ = self.stored[role].read(sample.image_id)
            elif role in self.networks:
                source = source_of(self.networks[role], self.config.attention.source)
                self._cams[key] = multi_scale_cams(source, sample.image, self.scales, flip)
            else:
                raise DataError(f"there is no {role} for {sample.image_id}: neither its maps nor its network")
        return self._cams[key]

    def explore(self, index: int, role: Role, settings: Settings, flip: bool | None = None) -> Exploration:
        """:func:`explore` of an image; ``flip`` None: as the run does."""
        flip = self.config.attention.flip if flip is None else flip
        return explore(self.samples[index], self.cams(index, role, flip), self.scales, settings)

    def add_photo(self, name: str, content: bytes) -> int:
        """Add a custom image, shrunk to :data:`PHOTO_SIDE`; its image label is what the first network predicts.

        Args:
            name: of the file.
            content: its bytes.

        Returns:
            Its index.

        Raises:
            DataError: if it is no picture that can be read, or there is no network to compute its maps.
        """
        if not self.networks:
            raise DataError("a photo needs a network to compute its maps, and this run has kept none")
        image = read_photo(name, content)
        network = self.networks[next(role for role in ROLES if role in self.networks)]
        if isinstance(network, ImageNetClassifier):
            self._add_classes(network, image)
        sample = Sample(Path(name).stem, image, predict_label(network, image, self.config))
        self.samples.append(sample)
        index = len(self.samples) - 1
        self._photos.add(index)
        return index

    def _add_classes(self, network: ImageNetClassifier, image: Tensor) -> None:
        """Let the gallery have the classes that a photo is likeliest to show, beside those of the photos before."""
        likeliest = network.likeliest_classes(image, LIKELIEST_CLASSES)
        network.classes += [number for number in likeliest if number not in network.classes]
        self.class_names = network.class_names
        self._cams.clear()
        for index, sample in enumerate(self.samples):
            padded = F.pad(sample.image_label, (0, len(self.class_names) - len(sample.image_label)))
            self.samples[index] = replace(sample, image_label=padded)

    def _is_stored(self, index: int, role: Role, flip: bool) -> bool:
        # A photo may have the name of an image of the run, whose maps are not the photo's.
        stored = role in self.stored and flip == self.config.attention.flip and index not in self._photos
        return stored and self.stored[role].path(self.samples[index].image_id).is_file()


def read_photo(name: str, content: bytes, side: int = PHOTO_SIDE) -> Tensor:
    """Decode a picture file that somebody gave, upright and with its longest side shrunk to ``side``.

    Returns:
        uint8 (3, H, W), RGB.

    Raises:
        DataError: if it cannot be decoded; the message says what can.
    """
    try:
        with open_picture(io.BytesIO(content), name) as picture:
            upright = ImageOps.exif_transpose(picture).convert("RGB")
    except DataError:
        raise
    except Exception as error:  # Pillow raises a dozen kinds on damaged files, and whatever it is, it is no photo
        raise DataError(f"{name or 'the file'} cannot be read as a picture; give a JPEG, PNG or WebP file") from error
    upright.thumbnail((side, side), Image.Resampling.BICUBIC)
    if min(upright.size) < 16:
        raise DataError(f"{name} is only {upright.width} x {upright.height} pixels; give one of at least 16 x 16")
    return torch.from_numpy(np.array(upright)).permute(2, 0, 1).contiguous()


def predict_label(network: Any, image: Tensor, config: Config) -> Tensor:
    """The classes whose logit is above 0, or the likeliest one where none is, as in ``smaf masks --learned``.

    Args:
        network: teacher, student or :class:`~smaflib.models.imagenet.ImageNetClassifier`.
        image: uint8 (3, H, W).
        config: of the run.

    Returns:
        float32 (K,) in {0, 1}.
    """
    network.eval()
    logits = classify_image(network, image, Runtime(device_of(network)), learned_views(config))
    return predict_labels(logits[None])[0]
