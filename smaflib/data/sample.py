"""The one thing every data set yields, and the list that loads it lazily."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from smaflib.errors import DataError


@dataclass(frozen=True)
class Sample:
    """An image, what is in it, and where they exist its saliency map and ground truth.

    Attributes:
        image_id: file name without its ending.
        image: uint8 (3, H, W), RGB.
        image_label: float32 (K,) in {0, 1}; the background has no image label.
        saliency: float32 (H, W) in [0, 1], or None.
        mask: uint8 (H, W), 0 background, 1 to K the classes, 255 void; None unless the ground truth was asked for.
    """

    image_id: str
    image: Tensor
    image_label: Tensor
    saliency: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True, slots=True)  # there may be 100,000 of them
class SampleFiles:
    """Paths of one sample; nothing is opened before it is asked for."""

    image_id: str
    image: Path
    labels: tuple[int, ...]  # class numbers, 0 to K-1
    saliency: Path | None = None
    mask: Path | None = None


@dataclass
class Samples(Sequence[Sample]):
    """A split of a data set: a sequence that decodes a sample when it is asked for.

    Masks are loaded only by :meth:`with_masks`, so that no training code meets one by accident.
    """

    files: tuple[SampleFiles, ...]
    class_names: tuple[str, ...]
    split: str
    read: Callable[[SampleFiles, int, bool], Sample]
    cached: bool = False
    load_masks: bool = False
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
        sample = self.read(self.files[index], len(self.class_names), self.load_masks)
        if self.cached:
            self._cache[index] = sample
        return sample

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self.files)))

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

    def with_masks(self) -> Samples:
        """The same samples with their masks, for evaluation."""
        if not self.has_ground_truth:
            missing = next((files.image_id for files in self.files if files.mask is None), "all of them")
            raise DataError(
                f"the split {self.split!r} cannot be evaluated: there is no mask for {missing}; set data.masks"
            )
        return replace(self, load_masks=True)

    @property
    def with_ground_truth(self) -> Samples:
        """The samples that have a mask: of VOC's 10,582 images of train_aug the 1,464 that the field evaluates on."""
        if self.has_ground_truth:
            return self
        return self.subset([index for index, files in enumerate(self.files) if files.mask is not None])

    def shown(self, num: int) -> Samples:
        """The first few, to be shown: with their ground truth where there is any."""
        with_ground_truth = self.with_ground_truth
        return with_ground_truth[:num].with_masks() if len(with_ground_truth) else self[:num]

    def subset(self, indices: Sequence[int]) -> Samples:
        return replace(self, files=tuple(self.files[index] for index in indices))

    def find(self, image_id: str) -> Sample:
        """The sample of that name.

        Raises:
            KeyError: if the split has no such image.
        """
        if image_id not in self.image_ids:
            first = f"the first is {self.image_ids[0]!r}" if self.files else "it is empty"
            raise KeyError(f"there is no image {image_id!r} in the split {self.split!r}; {first}")
        return self[self.image_ids.index(image_id)]
