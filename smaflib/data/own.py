"""Data sets of somebody's own, by the name in a config."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from smaflib.config import DataConfig, Split
from smaflib.data.labels import check_class_names
from smaflib.data.masks import check_mask_values
from smaflib.data.sample import Sample, SampleFiles, Samples
from smaflib.errors import DataError, PluginError
from smaflib.files import is_plain_name
from smaflib.plugins import DATA, calling, load, of_image


class Loader(Protocol):
    """A data set of somebody's own: where the samples of a split are, nothing decoded yet.

    Args:
        data: the settings; ``root``, ``images``, ``labels``, ``saliency``, ``masks`` and ``class_names`` mean what the
            data set makes of them.
        split: ``train`` or ``val``; there may be no image in ``val``.

    Returns:
        The samples. ``read(files, num_classes, load_masks)`` gives a :class:`~smaflib.data.sample.Sample` of the shapes
        and ranges that stand there, its image label that of ``files.labels``; a mask only if ``load_masks``.
    """

    def __call__(self, data: DataConfig, split: Split, /) -> Samples: ...


def load_own(data: DataConfig, split: Split) -> Samples:
    """The samples of a split by the :class:`Loader` that ``data.kind`` names; each is checked when it is read.

    Raises:
        PluginError: if there is no such loader, it raises, or what it returns does not fit.
    """
    what = f"the data set {data.kind}"
    loader: Loader = load(DATA, data.kind)
    with calling(what):
        samples = loader(data, split)
    if not isinstance(samples, Samples):
        raise PluginError(f"{what} returned a {type(samples).__name__} for {split!r}; it must return Samples")
    samples = replace(samples, files=tuple(samples.files), class_names=tuple(samples.class_names))
    try:
        check_class_names(samples.class_names)
    except DataError as error:
        raise PluginError(f"{what}: {error}") from error
    _check_files(what, samples, split)
    read = functools.partial(_read_checked, what, samples.read)
    samples = replace(samples, split=split, read=read, cached=samples.cached or data.cache)
    return samples[: data.max_images] if data.max_images else samples


def _check_files(what: str, samples: Samples, split: Split) -> None:
    if split == "train" and not samples.files:
        raise PluginError(f"{what} has no image in 'train'; there is nothing to learn from")
    counts, num_classes = Counter(samples.image_ids), len(samples.class_names)
    if twice := [image_id for image_id, count in counts.items() if count > 1]:
        raise PluginError(f"{what} has the image {twice[0]!r} twice in {split!r}; each needs an image_id of its own")
    for files in samples.files:
        if not isinstance(files, SampleFiles) or not is_plain_name(files.image_id):
            raise PluginError(f"{what}: {files!r:.200} must be SampleFiles whose image_id can be the name of a file")
        if not set(files.labels) <= set(range(num_classes)):
            raise PluginError(
                f"{what}: image {files.image_id} has the labels {files.labels}; they must be class numbers, 0 to "
                f"{num_classes - 1}, for the classes {', '.join(samples.class_names[:5])}"
            )


def _read_checked(
    what: str,
    read: Callable[[SampleFiles, int, bool], Sample],
    files: SampleFiles,
    num_classes: int,
    load_masks: bool,
) -> Sample:
    with of_image(files.image_id):
        with calling(what):
            sample = read(files, num_classes, load_masks)
        _check_sample(what, sample, files, num_classes, load_masks)
    return sample if load_masks else replace(sample, mask=None)


def _check_sample(what: str, sample: object, files: SampleFiles, num_classes: int, load_masks: bool) -> None:
    if not isinstance(sample, Sample):
        raise PluginError(f"{what}: read() returned a {type(sample).__name__}; it must return a Sample")
    image = _checked(what, "image", sample.image, torch.uint8, (3, None, None))
    size = (image.shape[-2], image.shape[-1])
    label = _checked(what, "image_label", sample.image_label, torch.float32, (num_classes,))
    if sorted(files.labels) != label.nonzero()[:, 0].tolist() or not bool(((label == 0) | (label == 1)).all()):
        raise PluginError(f"{what}: image_label is {label.tolist()}, but the labels are the classes {files.labels}")
    if files.saliency is not None:
        saliency = _checked(what, "saliency", sample.saliency, torch.float32, size)
        if not bool(((saliency >= 0) & (saliency <= 1)).all()):
            raise PluginError(f"{what}: saliency must be in [0, 1], not nan")
    if load_masks and files.mask is not None:
        mask = _checked(what, "mask", sample.mask, torch.uint8, size)
        try:
            check_mask_values(mask, num_classes, files.mask)
        except DataError as error:
            raise PluginError(f"{what}: {error}") from error


def _checked(what: str, part: str, value: object, dtype: torch.dtype, shape: tuple[int | None, ...]) -> Tensor:
    if (
        not isinstance(value, Tensor)
        or value.dtype != dtype
        or value.dim() != len(shape)
        or any(wanted not in (None, found) for wanted, found in zip(shape, value.shape, strict=True))
    ):
        found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise PluginError(f"{what}: {part} is {found}; it must be {dtype} ({wanted})")
    return value
