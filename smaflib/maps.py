"""Attention maps of whole splits: stored once per image and scale, fused and denoised when they are read.

Stage 2 writes them (:func:`write_attention_maps`); every later stage reads :class:`FusedMaps`.
"""

import gzip
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn

from smaflib.cams import Fusion, attend_views, fuse_cams
from smaflib.config import AttentionConfig
from smaflib.data.masks import strongest
from smaflib.data.sample import Samples
from smaflib.data.views import ViewBatch, load_views
from smaflib.errors import DataError
from smaflib.files import replacing
from smaflib.processes import missing_files
from smaflib.reactivation import blend_saliency
from smaflib.runtime import Runtime, memory_advice, release_freed_memory
from smaflib.sources import as_source

ENDING = ".safetensors.gz"  # of a file of attention maps
COMPRESSION = 6  # of gzip, 1 to 9: at 9 writing takes several times as long, for files that are as large


@dataclass(frozen=True)
class AttentionMaps:
    """A folder of class attention maps, one file per image: written once, fused when read.

    Fusing again is cheaper than reading fused maps, and leaves the fusion rule open. The files are gzipped safetensors:
    threads that read numpy's ``.npz`` fail at random, since they share the state with which Python 3.11 parses headers.
    """

    folder: Path
    scales: tuple[float, ...]

    def path(self, image_id: str) -> Path:
        return self.folder / f"{image_id}{ENDING}"

    def write(self, image_id: str, cams: Sequence[Tensor], size: tuple[int, int]) -> None:
        """Store one image's maps in half precision."""
        tensors = {f"scale_{scale:g}": cam.half().contiguous() for scale, cam in zip(self.scales, cams, strict=True)}
        with replacing(self.path(image_id)) as temporary:
            temporary.write_bytes(gzip.compress(save(tensors | {"size": torch.tensor(size)}), COMPRESSION, mtime=0))

    def read(self, image_id: str, scales: Sequence[float] | None = None) -> tuple[list[Tensor], tuple[int, int]]:
        """One image's maps, per scale (K, h_s, w_s), of all scales or some, and its (H, W); DataError if damaged."""
        path = self.path(image_id)
        names = [f"scale_{scale:g}" for scale in scales or self.scales]
        try:
            tensors = load(gzip.decompress(path.read_bytes()))
            height, width = tensors["size"].tolist()
            return [tensors[name].float() for name in names], (height, width)
        except FileNotFoundError:
            who = "notebook 03 (teacher) or 05 (student)"
            raise DataError(f"there are no attention maps {path}; {who} writes them") from None
        except Exception as error:  # whatever gzip, zlib and safetensors raise for damaged bytes
            cause = f"{path} is not a complete file of attention maps ({error})"
            raise DataError(f"{cause}; delete it and run again") from error

    def fused(self, image_id: str, rule: str | Fusion = "sum", scales: Sequence[float] | None = None) -> Tensor:
        """(K, H, W) in [0, 1], of all scales or some."""
        return fuse_cams(*self.read(image_id, scales), rule, scales or self.scales)


def write_attention_maps(
    network: nn.Module, samples: Samples, folder: Path, config: AttentionConfig, runtime: Runtime
) -> AttentionMaps:
    """Attention maps of a whole split, one file per image; existing files are skipped, processes share the images.

    The ``network`` is a source, a network, or any module with ``attention``, asked for the classes of the image labels.
    """
    maps, image_ids = AttentionMaps(folder, config.scales), samples.image_ids
    missing, source = missing_files(folder, image_ids, ENDING), as_source(network)
    runtime.place(source)

    def write(batch: ViewBatch, cams: list[Tensor]) -> None:
        for row, index in enumerate(batch.indices):
            maps.write(image_ids[index], [cam[row] for cam in cams], batch.size)

    # A thread compresses and writes a batch while the next one is computed.
    with ThreadPoolExecutor(max_workers=1) as writer, memory_advice("leave the largest scale out of attention.scales"):
        written: Future[None] = writer.submit(lambda: None)
        desc = f"attention of {samples.split} images"
        for batch in load_views(samples, config.scales, runtime, missing, desc, source.patch):
            classes = [samples.files[index].labels for index in batch.indices]
            how = (config.flip, runtime, config.caa, config.correlation)
            cams = attend_views(source, batch.views, config.scales, classes, *how)
            written.result()
            written = writer.submit(write, batch, cams)
        written.result()
    release_freed_memory()
    return maps


def fuse_and_denoise(
    cams: Sequence[Tensor],
    size: tuple[int, int],
    image_label: Tensor,
    rule: str | Fusion = "sum",
    scales: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """:func:`~smaflib.cams.fuse_cams`, then :func:`~smaflib.reactivation.denoise`, at the cost of the labelled classes.

    Fusion treats each class independently, so the classes that denoising erases need not be fused.
    """
    denoised = torch.zeros(len(image_label), *size)
    present = image_label.nonzero()[:, 0]
    if len(present):
        denoised[present] = fuse_cams([cam[present] for cam in cams], size, rule, scales, weights)
    return denoised


@dataclass(eq=False)
class FusedMaps(Sequence[Tensor]):
    """Fused and denoised maps of a split, (K, H, W) in [0, 1] per image, read when asked for."""

    maps: AttentionMaps
    samples: Samples  # the split, for order and image labels
    rule: str | Fusion = "sum"
    scales: Sequence[float] | None = None  # to fuse; None: all. A single one is the control of the paper's claim.
    cached: bool = False  # keep what was read, in half precision
    denoise: bool = True  # False keeps the maps of absent classes
    saliency_weight: float = 0.0  # share of the saliency maps (:func:`~smaflib.reactivation.blend_saliency`)
    _cache: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        labels = self.samples.image_labels
        self.saliency, self.shown = SaliencyMaps(self.samples), labels if self.denoise else torch.ones_like(labels)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        present, maps = self.present(index)
        whole = torch.zeros(self.shown.shape[1], *maps.shape[1:])
        whole[present] = maps
        return whole

    def strongest(self, index: int) -> tuple[Tensor, Tensor]:
        """Per pixel of an image the highest score, (H, W), and its class, int64 (H, W); any class where that is 0."""
        present, maps = self.present(index)
        if len(present) == 0:
            return torch.zeros(maps.shape[1:]), torch.zeros(maps.shape[1:], dtype=torch.int64)
        score, winner = strongest(maps)
        return score, present[winner]

    def present(self, index: int) -> tuple[Tensor, Tensor]:
        """The numbers (P,) of the classes that an image shows, and their maps (P, H, W): one or two of VOC's twenty."""
        present = self.shown[index].nonzero()[:, 0]
        if index in self._cache:
            return present, self._cache[index].float()
        cams, size = self.maps.read(self.samples.files[index].image_id, self.scales)
        maps = torch.zeros(0, *size)
        if len(present):
            maps = fuse_cams([cam[present] for cam in cams], size, self.rule, self.scales or self.maps.scales)
            if self.saliency_weight:
                maps = blend_saliency(maps, self.saliency[index], self.saliency_weight)
        if self.cached:
            self._cache[index] = maps = maps.half()
        return present, maps.float()


@dataclass(eq=False)
class MaskMaps(Sequence[Tensor]):
    """Masks, uint8 (H, W) each, as class maps (K, H, W) of 0 and 1: targets of a student."""

    masks: Sequence[Tensor]
    num_classes: int

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        return F.one_hot(self.masks[index].long(), self.num_classes + 1).permute(2, 0, 1)[1:].float()


@dataclass(eq=False)
class SaliencyMaps(Sequence[Tensor]):
    """The saliency maps of a split, float32 (H, W) in [0, 1] each, read when asked for."""

    samples: Samples

    def __post_init__(self) -> None:
        self.samples = self.samples.with_saliency()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        saliency = self.samples[index].saliency
        if saliency is None:
            raise DataError(f"there is no saliency map of {self.samples.files[index].image_id}; set data.saliency")
        return saliency
