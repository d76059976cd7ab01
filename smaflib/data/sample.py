"""One image with what is known about it, and a split of a data set that decodes images on demand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from smaflib.data.masks import MaskFiles
from smaflib.errors import DataError


@dataclass(frozen=True)
class Sample:
    """An image and what is known about it.

    Attributes:
        image_id: file name without extension.
        image: uint8 (3, H, W), RGB.
        image_label: float32 (K,) in {0, 1}; the background has no entry.
        saliency: float32 (H, W) in [0, 1]; None unless requested and available.
        mask: ground truth, uint8 (H, W), 0 background, 1 to K the classes, 255 void; None likewise.
    """

    image_id: str
    image: Tensor
    image_label: Tensor
    saliency: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True, slots=True)  # there may be 100,000 of them
class SampleFiles:
    """The paths of one sample and its labels, class numbers from 0 to K-1."""

    image_id: str
    image: Path
    labels: tuple[int, ...]
    saliency: Path | None = None
    mask: Path | None = None


@dataclass
class Samples(Sequence[Sample]):
    """A split of a data set; a sample is decoded when it is indexed.

    Saliency maps and ground truth are read on request only: most stages need neither, and no training code should see
    ground truth by accident.

    Attributes:
        files: one entry per image.
        class_names: the K classes, in the order of the mask values 1 to K.
        split: ``train`` or ``val``.
        read: ``read(files, num_classes)`` decodes all parts that ``files`` names; those not requested are None there.
        cached: keep decoded samples in memory.
        load_saliency: read saliency maps too.
        load_ground_truth: read ground truth too.
    """

    files: tuple[SampleFiles, ...]
    class_names: tuple[str, ...]
    split: str
    read: Callable[[SampleFiles, int], Sample]
    cached: bool = False
    load_saliency: bool = False
    load_ground_truth: bool = False
    _cache: dict[int, Sample] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Samples: ...

    def __getitem__(self, index: int | slice) -> Sample | Samples:
        if isinstance(index, slice):
            return self.subset(range(len(self.files))[index])
        index = range(len(self.files))[index]  # negative numbers, IndexError
        if index in self._cache:
            return self._cache[index]
        files = self.files[index]
        saliency, mask = self.load_saliency and files.saliency, self.load_ground_truth and files.mask
        sample = self.read(replace(files, saliency=saliency or None, mask=mask or None), len(self.class_names))
        if self.cached:
            self._cache[index] = sample
        return sample

    @property
    def image_ids(self) -> list[str]:
        return [files.image_id for files in self.files]

    @property
    def image_labels(self) -> Tensor:
        """float32 (N, K) in {0, 1}, without opening an image."""
        labels = torch.zeros(len(self.files), len(self.class_names))
        for row, files in enumerate(self.files):
            labels[row, list(files.labels)] = 1
        return labels

    @property
    def has_ground_truth(self) -> bool:
        return bool(self.files) and all(files.mask is not None for files in self.files)

    @property
    def has_saliency(self) -> bool:
        return bool(self.files) and all(files.saliency is not None for files in self.files)

    def with_saliency(self) -> Samples:
        """The same samples, read with their saliency maps where there are any."""
        return replace(self, load_saliency=True)

    def with_ground_truth(self) -> Samples:
        """The same samples, read with their masks, for evaluation; :class:`DataError` if an image has none."""
        if not self.has_ground_truth:
            raise DataError(f"the split {self.split!r} has images without ground truth; set data.masks")
        return replace(self, load_ground_truth=True)

    @property
    def ground_truth(self) -> MaskFiles | None:
        """The masks alone, uint8 (H, W) each, read when indexed; None if an image has none."""
        return MaskFiles([files.mask for files in self.files if files.mask]) if self.has_ground_truth else None

    @property
    def annotated(self) -> Samples:
        """The samples that have a mask: of VOC's 10,582 images of train_aug the 1,464 that the field evaluates on."""
        return self.subset([index for index, files in enumerate(self.files) if files.mask is not None])

    def examples(self, num: int) -> Samples:
        """The first few samples for display, with their ground truth if there is any."""
        return self.annotated[:num].with_ground_truth() if self.annotated else self[:num]

    def subset(self, indices: Sequence[int]) -> Samples:
        return replace(self, files=tuple(self.files[index] for index in indices))
