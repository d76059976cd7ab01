"""Stage 6: an ordinary segmentation network, trained on the pseudo masks as if a person had drawn them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from torch import Tensor, nn

from smaflib.classifier import standardize_features
from smaflib.config import ModelConfig, SegmentationConfig
from smaflib.data.classes import VOID_LABEL
from smaflib.data.masks import save_mask
from smaflib.data.sample import Samples, same_size
from smaflib.data.transforms import normalize, scaled_size
from smaflib.distributed.ranks import missing_here, wait_for_all
from smaflib.models.networks import AttentionNetwork, SegmentationNetwork, SummedBranches
from smaflib.refinement import dense_crf, refine_many
from smaflib.runtime import HostThreads, Runtime, derive_seed, device_of, progress, seeded, start_copy
from smaflib.training import Batch, Batches, CropField, History, fit


def train_segmenter(
    samples: Samples,
    masks: Sequence[Tensor],
    model: ModelConfig,
    settings: SegmentationConfig,
    runtime: Runtime,
    *,
    student: AttentionNetwork | None = None,
    checkpoint: Path | None = None,
    num_workers: int = 0,
) -> tuple[SegmentationNetwork, History]:
    """Train a segmentation network.

    Args:
        samples: the training split.
        masks: per sample uint8 (H, W): pseudo masks, or the ground truth for the upper bound; 255 does not count.
        model: backbone and weights, where ``settings.model`` names none of its own.
        settings: of stage 6.
        runtime: device, precision and seed.
        student: where given, the network starts from it, which was learned from image labels only: see
            :func:`start_as_student`.
        checkpoint: where weights are kept; an unfinished training resumes from there.
        num_workers: loader processes.

    Returns:
        The network in eval mode and its learning curve.
    """
    with seeded(derive_seed(runtime.seed, "segmenter's initial weights")):
        network = SegmentationNetwork(settings.model or model, settings, len(samples.class_names)).to(runtime.device)
    if student is not None:
        start_as_student(network, student)
    masks_field = CropField("mask", masks, "nearest", fill=VOID_LABEL)
    batches = Batches(samples, settings, derive_seed(runtime.seed, "segmenter"), masks_field, num_workers)
    if network.config.freeze_backbone and not (checkpoint and checkpoint.is_file()):
        standardize_features(network, batches, runtime)

    def loss(batch: Batch) -> dict[str, Tensor]:
        views = multi_scale_logits(network, batch["image"], settings.loss_scales)
        return {"L_seg": torch.stack([segmentation_loss(logits, batch["mask"]) for logits in views]).sum()}

    def num_terms(batch: Batch) -> Tensor:
        return (batch["mask"] != VOID_LABEL).sum()

    history = fit(network, batches, loss, runtime, checkpoint, desc="segmentation", num_terms=num_terms)
    return network, history


@torch.no_grad()
def start_as_student(network: SegmentationNetwork, student: AttentionNetwork) -> None:
    """Give a segmentation network the features of a student, and where its head allows it, the student's logits.

    DeepLab-V2's head is a sum of 3x3 convolutions. Where each has its share of the student's 1x1 convolution in the
    middle and zeros around it, the network starts as the student does and learns the neighbourhood from there. Other
    heads, and a student with ``model.head_channels``, have no such place; they start at random.

    Args:
        network: changed in place.
        student: of the same backbone and classes.
    """
    network.backbone.load_state_dict(student.backbone.state_dict())
    branches = network.aspp
    whole = isinstance(branches, SummedBranches) and not network.skip
    if not (whole and student.background and isinstance(student.neck, nn.Identity)):
        return
    network.standardize.load_state_dict(student.standardize.state_dict())
    for branch in branches.children():
        assert isinstance(branch, nn.Conv2d) and branch.bias is not None
        branch.weight.zero_()
        branch.bias.zero_()
        branch.weight[:, :, 1, 1] = student.head.weight[:, :, 0, 0] / len(branches)  # type: ignore[arg-type]


def multi_scale_logits(network: nn.Module, images: Tensor, scales: Sequence[float]) -> list[Tensor]:
    """Logits of a batch at several scales, and their maximum: what DeepLab-V2 learns from.

    Args:
        network: (B, 3, H, W) to (B, K+1, h, w).
        images: float32 (B, 3, H, W), normalised.
        scales: factors of their size; bilinear.

    Returns:
        Per scale (B, K+1, h_s, w_s); of several scales also the maximum over them, at the size of the largest.

    Source: Chen et al., "DeepLab", TPAMI 2018, section 4.1.1, "multi-scale inputs".
    """
    views = []
    for scale in scales:
        size = scaled_size(images.shape[2:], scale)
        scaled = images if scale == 1 else F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        views.append(network(scaled))
    if len(views) == 1:
        return views
    largest = max(views, key=lambda logits: logits.shape[2]).shape[2:]
    same = [F.interpolate(logits, size=largest, mode="bilinear", align_corners=False) for logits in views]
    return [*views, torch.stack(same).amax(dim=0)]


def segmentation_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy at full resolution.

    Args:
        logits: (B, K+1, h, w).
        mask: uint8 (B, H, W); 255 does not count.

    Returns:
        Scalar; 0 where every pixel is void.
    """
    upsampled = F.interpolate(logits.float(), size=mask.shape[1:], mode="bilinear", align_corners=False)
    # A GPU adds up the losses of all pixels in any order, unless it has to give each.
    each = logits.is_cuda and torch.are_deterministic_algorithms_enabled()
    losses = F.cross_entropy(upsampled, mask.long(), ignore_index=VOID_LABEL, reduction="none" if each else "sum")
    return losses.sum() / (mask != VOID_LABEL).sum().clamp(min=1)


def segment(network: nn.Module, image: Tensor, config: SegmentationConfig, runtime: Runtime | None = None) -> Tensor:
    """Label an image's pixels: the most probable class, after the CRF if the config has one.

    Args:
        network: gives (B, K+1, h, w) logits.
        image: uint8 (3, H, W).
        config: ``test_scales``, ``test_flip``, ``test_crf``.
        runtime: device and precision; None: float32 on the CPU.

    Returns:
        uint8 (H, W).
    """
    probabilities = class_probabilities(network, image, config, runtime)
    if config.test_crf is None:
        return probabilities.max(dim=0).indices.to(torch.uint8)
    given = probabilities if config.test_crf.unary == "scores" else probabilities.max(dim=0).indices
    return dense_crf(image, given, config.test_crf, len(probabilities), device=runtime.device if runtime else None)


def class_probabilities(
    network: nn.Module, image: Tensor, config: SegmentationConfig, runtime: Runtime | None = None
) -> Tensor:
    """Softmax, averaged over the test scales and flips: float32 (K+1, H, W); arguments as of :func:`segment`."""
    size = (image.shape[-2], image.shape[-1])
    return probabilities_of_inputs(network, segmentation_inputs(image[None], config), size, config, runtime)[0].cpu()


def segmentation_inputs(images: Tensor, config: SegmentationConfig) -> list[Tensor]:
    """Images as the network takes them, once per test scale: the host's part of :func:`class_probabilities`.

    Args:
        images: uint8 (B, 3, H, W).
        config: ``test_scales``.

    Returns:
        Per scale float32 (B, 3, H_s, W_s), normalised.
    """
    sizes = [scaled_size(images.shape[-2:], scale) for scale in config.test_scales]
    return [normalize(TF.resize(images, list(size), TF.InterpolationMode.BICUBIC)) for size in sizes]


@torch.no_grad()
def probabilities_of_inputs(
    network: nn.Module,
    inputs: Sequence[Tensor],
    size: tuple[int, int],
    config: SegmentationConfig,
    runtime: Runtime | None = None,
) -> Tensor:
    """The network's part of :func:`class_probabilities`.

    Args:
        network: as there.
        inputs: as of :func:`segmentation_inputs`.
        size: (H, W) of the images.
        config: ``test_flip``.
        runtime: as there.

    Returns:
        float32 (B, K+1, H, W), on the network's device.
    """
    network.eval()
    total = torch.zeros((), device=device_of(network))
    for scaled in inputs:
        views = scaled.to(device_of(network), non_blocking=True)
        views = torch.cat([views, views.flip(-1)]) if config.test_flip else views
        with runtime.autocast() if runtime else torch.autocast("cpu", enabled=False):
            logits = network(views).float()
        probabilities = F.interpolate(logits, size=size, mode="bilinear", align_corners=False).softmax(dim=1)
        if config.test_flip:
            plain, mirrored = probabilities.chunk(2)
            probabilities = (plain + mirrored.flip(-1)) / 2
        total = total + probabilities
    return total / len(config.test_scales)


GPU_BATCH = 4
"""Neighbours of one size that a GPU segments together. A CPU takes images one by one, which needs less memory."""


def segment_many(
    network: SegmentationNetwork,
    images: Iterable[Tensor],
    settings: SegmentationConfig,
    runtime: Runtime,
    host: HostThreads | None = None,
) -> Iterator[Tensor]:
    """:func:`segment` of many images, in their order; the CRF, if there is one, on the other cores or on the GPU.

    Args:
        network: gives (B, K+1, h, w) logits; is placed on the runtime's device.
        images: uint8 (3, H, W) each, taken as there is room.
        settings: ``test_scales``, ``test_flip``, ``test_crf``, and the CRF's back-end and processes.
        runtime: device and precision.
        host: threads that resize the next images while a GPU computes; None: its own, as of
            :meth:`~smaflib.runtime.Runtime.host_threads`.

    Yields:
        uint8 (H, W) per image.
    """
    runtime.place(network)
    crf = settings.test_crf
    scores = crf is not None and crf.unary == "scores"
    found = _found_ahead(network, images, settings, runtime, scores, host)
    if crf is None:
        yield from (labels for _, labels in found)
        return
    workers, backend = settings.test_crf_workers, settings.test_crf_backend
    yield from refine_many(found, crf, network.num_classes + 1, workers, backend, runtime.device)


def _found_ahead(
    network: nn.Module,
    images: Iterable[Tensor],
    settings: SegmentationConfig,
    runtime: Runtime,
    scores: bool,
    host: HostThreads | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each image with its labels, uint8 (H, W), or its probabilities (K+1, H, W), on the CPU."""
    most_pixels = sys.maxsize if runtime.computes_behind else 0

    def prepare(together: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return together, [runtime.pinned(scaled) for scaled in segmentation_inputs(torch.stack(together), settings)]

    def start(prepared: tuple[list[Tensor], list[Tensor]]) -> tuple[list[Tensor], Callable[[], list[Tensor]]]:
        together, inputs = prepared
        size = (together[0].shape[-2], together[0].shape[-1])
        found = probabilities_of_inputs(network, inputs, size, settings, runtime)
        return together, start_copy([found if scores else found.max(dim=1).indices.to(torch.uint8)])

    def wait(started: tuple[list[Tensor], Callable[[], list[Tensor]]]) -> list[tuple[Tensor, Tensor]]:
        return list(zip(started[0], started[1]()[0], strict=True))

    with contextlib.nullcontext(host) if host else runtime.host_threads() as threads:
        prepared = threads.ahead(prepare, same_size(images, lambda image: image, GPU_BATCH, most_pixels))
        # A thread of its own: those that wait for the GPU do not prepare what it takes next.
        with HostThreads(min(1, threads.workers)) as waiting:
            for found in waiting.ahead(wait, map(start, prepared)):
                yield from found


def write_segmentation(
    network: SegmentationNetwork, samples: Samples, folder: Path, settings: SegmentationConfig, runtime: Runtime
) -> None:
    """Segment a split into palette PNGs, ``<image_id>.png``; images that have theirs already are skipped.

    Args:
        network: trained.
        samples: the split.
        folder: takes the masks.
        settings: as of :func:`segment_many`.
        runtime: device and precision.
    """
    names = [f"{image_id}.png" for image_id in samples.image_ids]
    missing = missing_here(folder, names)
    with runtime.host_threads() as readers, runtime.host_threads() as writers:
        images = readers.ahead(lambda index: samples[index].image, missing)
        named = zip(missing, segment_many(network, images, settings, runtime, readers), strict=True)
        written = writers.ahead(lambda made: save_mask(folder / names[made[0]], made[1]), named)
        for _ in progress(written, len(missing), f"segment {samples.split}"):
            pass
    wait_for_all()
