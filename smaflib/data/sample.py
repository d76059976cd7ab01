"""One image with what is known about it, and a split of a data set that decodes images on demand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self, overload

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode

from smaflib.data.masks import MaskFiles, resize_mask
from smaflib.data.transforms import working_size
from smaflib.errors import DataError
from smaflib.runtime import progress


@dataclass(frozen=True)
class Sample:
    """An image and what is known about it; saliency and mask are None unless requested and available."""

    image_id: str  # file name without extension
    image: Tensor  # uint8 (3, H, W), RGB
    image_label: Tensor  # float32 (K,) in {0, 1}; the background has no entry
    saliency: Tensor | None = None  # float32 (H, W) in [0, 1]
    mask: Tensor | None = None  # ground truth, uint8 (H, W): 0 background, 1 to K the classes, 255 void
    full_size: tuple[int, int] | None = None  # (H, W) of the file, if the sample has been brought to a working size

    def at_working_size(self, longest_side: int) -> Self:
        """The same sample at :func:`~smaflib.data.transforms.working_size`."""
        full_size = (self.image.shape[-2], self.image.shape[-1])
        size = working_size(full_size, longest_side)
        image = F.resize(self.image, list(size), InterpolationMode.BICUBIC)
        saliency = None if self.saliency is None else F.resize(self.saliency[None], list(size))[0]
        mask = None if self.mask is None else resize_mask(self.mask, size)
        return replace(self, image=image, saliency=saliency, mask=mask, full_size=full_size)


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

    ``read(files, num_classes)`` decodes all parts that ``files`` names; those not requested are None there.
    """

    files: tuple[SampleFiles, ...]  # one entry per image
    class_names: tuple[str, ...]  # the K classes, in the order of the mask values 1 to K
    split: str  # train or val
    read: Callable[[SampleFiles, int], Sample]
    cached: bool = False  # keep decoded samples in memory
    load_saliency: bool = False
    load_ground_truth: bool = False
    longest_side: int | None = None  # working size of samples and masks (data.longest_side); None: that of the files
    _cache: dict[int, Sample] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...

    def __getitem__(self, index: int | slice) -> Sample | Self:
        if isinstance(index, slice):
            return self.subset(range(len(self.files))[index])
        index = range(len(self.files))[index]  # negative numbers, IndexError
        if index in self._cache:
            return self._cache[index]
        files = self.files[index]
        saliency, mask = self.load_saliency and files.saliency, self.load_ground_truth and files.mask
        sample = self.read(replace(files, saliency=saliency or None, mask=mask or None), len(self.class_names))
        if self.longest_side:
            sample = sample.at_working_size(self.longest_side)
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

    def with_saliency(self) -> Self:
        """The same samples, read with their saliency maps where there are any."""
        return replace(self, load_saliency=True)

    def with_ground_truth(self) -> Self:
        """The same samples, read with their masks, for evaluation; :class:`DataError` if an image has none."""
        if not self.has_ground_truth:
            raise DataError(f"the split {self.split!r} has images without ground truth; set data.masks")
        return replace(self, load_ground_truth=True)

    def without_ground_truth(self) -> Self:
        """The same samples as if the data set had no masks."""
        return replace(self, files=tuple(replace(files, mask=None) for files in self.files))

    def check_images(self) -> None:
        """Read every image; a :class:`DataError` lists those that cannot be used."""
        problems = []
        for index in progress(range(len(self)), len(self), f"read {self.split} images"):
            try:
                self[index]
            except DataError as error:
                problems.append(str(error))
        if problems:
            more = len(problems) - 10
            raise DataError("\n".join(problems[:10] + [f"and {more} more"] * (more > 0)))

    @property
    def ground_truth(self) -> MaskFiles | None:
        """The masks alone, uint8 (H, W) each, read when indexed; None if an image has none."""
        paths = [files.mask for files in self.files if files.mask]
        return MaskFiles(paths, self.longest_side) if self.has_ground_truth else None

    def at_full_size(self, index: int, mask: Tensor) -> Tensor:
        """A sample's mask, uint8 (H, W) at its working size, at the size of the image's file."""
        full_size = self[index].full_size if self.longest_side else None
        return resize_mask(mask, full_size) if full_size else mask

    @property
    def annotated(self) -> Self:
        """The samples that have a mask: of VOC's 10,582 images of train_aug the 1,464 that the field evaluates on."""
        return self.subset([index for index, files in enumerate(self.files) if files.mask is not None])

    def examples(self, num: int) -> Self:
        """The first few samples with a label for display, with their ground truth if there is any."""
        labelled = self.subset([index for index, files in enumerate(self.files) if files.labels])
        return labelled.annotated[:num].with_ground_truth() if labelled.annotated else labelled[:num]

    def subset(self, indices: Sequence[int]) -> Self:
        return replace(self, files=tuple(self.files[index] for index in indices))
