"""Stage 6: an ordinary segmentation network, trained on the pseudo masks as if a person had drawn them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smaflib.classifier import standardize_features
from smaflib.config import ModelConfig, SegmentationConfig
from smaflib.data.classes import VOID_LABEL
from smaflib.data.masks import save_mask
from smaflib.data.sample import Sample, Samples
from smaflib.data.transforms import scaled_size
from smaflib.data.views import load_views, views_of
from smaflib.models.networks import AttentionNetwork, SegmentationNetwork, SummedBranches
from smaflib.processes import missing_files
from smaflib.refinement import dense_crf, refine_many
from smaflib.runtime import Runtime, derive_seed, device_of, seeded
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
        model: backbone and weights, unless ``settings.model`` names others.
        student: the network starts from it (:func:`start_as_student`), which has learned from image labels only.
        checkpoint: file of the weights; an unfinished training resumes from it.

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

    history = fit(network, batches, loss, runtime, checkpoint, stage="segmentation", num_terms=num_terms)
    return network, history


@torch.no_grad()
def start_as_student(network: SegmentationNetwork, student: AttentionNetwork) -> None:
    """Give a segmentation network the features of a student, and where its head allows it, the student's logits.

    DeepLab-V2's head is a sum of 3x3 convolutions. If each has its share of the student's 1x1 convolution in the middle
    and zeros around it, the network starts as the student and learns the neighbourhood from there. Other heads, and
    heads after ``model.head_channels``, start at random.

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
    """Logits of a batch at several scales, and their maximum: the outputs on which DeepLab-V2 has a loss.

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
    """Cross-entropy at full resolution of logits (B, K+1, h, w) and masks, uint8 (B, H, W); 255 does not count.

    Returns a scalar, 0 if every pixel is void.
    """
    upsampled = F.interpolate(logits.float(), size=mask.shape[1:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(upsampled, mask.long(), ignore_index=VOID_LABEL, reduction="sum")
    return total / (mask != VOID_LABEL).sum().clamp(min=1)


def segment(network: nn.Module, image: Tensor, config: SegmentationConfig, runtime: Runtime | None = None) -> Tensor:
    """Label an image's pixels: the most probable class, after the CRF if the config has one.

    Args:
        network: (B, 3, H, W) to logits (B, K+1, h, w).
        image: uint8 (3, H, W).
        config: ``test_scales``, ``test_flip``, ``test_crf``.
        runtime: device and precision; None: float32 on the CPU.

    Returns:
        uint8 (H, W).
    """
    views = [view[None] for view in views_of(image, config.test_scales)]
    size = (image.shape[-2], image.shape[-1])
    probabilities = class_probabilities(network, views, size, config, runtime)[0].cpu()
    if config.test_crf is None:
        return probabilities.max(dim=0).indices.to(torch.uint8)
    given = probabilities if config.test_crf.unary == "scores" else probabilities.max(dim=0).indices
    return dense_crf(image, given, config.test_crf, len(probabilities), device=runtime.device if runtime else None)


@torch.no_grad()
def class_probabilities(
    network: nn.Module,
    views: Sequence[Tensor],
    size: tuple[int, int],
    config: SegmentationConfig,
    runtime: Runtime | None = None,
) -> Tensor:
    """Softmax, averaged over test scales and flips.

    Args:
        network: as of :func:`segment`.
        views: per scale float32 (B, 3, H_s, W_s), normalised.
        size: (H, W) of the images.
        config: ``test_flip``.

    Returns:
        float32 (B, K+1, H, W), on the network's device.
    """
    network.eval()
    total = torch.zeros((), device=device_of(network))
    for view in views:
        images = view.to(device_of(network))
        with runtime.autocast() if runtime else torch.autocast("cpu", enabled=False):
            logits = network(torch.cat([images, images.flip(-1)]) if config.test_flip else images).float()
        probabilities = F.interpolate(logits, size=size, mode="bilinear", align_corners=False).softmax(dim=1)
        if config.test_flip:
            plain, mirrored = probabilities.chunk(2)
            probabilities = (plain + mirrored.flip(-1)) / 2
        total = total + probabilities
    return total / len(views)


def segment_many(
    network: SegmentationNetwork,
    samples: Sequence[Sample],
    settings: SegmentationConfig,
    runtime: Runtime,
    indices: Sequence[int] | None = None,
    desc: str = "segment",
) -> Iterator[Tensor]:
    """:func:`segment` of many images, in order; the CRF runs on the other cores or on the GPU.

    ``indices`` chooses among the samples. The network is moved to the runtime's device.
    """
    runtime.place(network)
    crf = settings.test_crf

    def unrefined() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in load_views(samples, settings.test_scales, runtime, indices, desc):
            probabilities = class_probabilities(network, batch.views, batch.size, settings, runtime)
            soft = crf is not None and crf.unary == "scores"
            given = probabilities if soft else probabilities.max(dim=1).indices.to(torch.uint8)
            yield from zip(batch.images, given.cpu(), strict=True)

    if crf is None:
        yield from (labels for _, labels in unrefined())
    else:
        workers, backend = settings.test_crf_workers, settings.test_crf_backend
        yield from refine_many(unrefined(), crf, network.num_classes + 1, workers, backend, runtime.device)


def write_segmentation(
    network: SegmentationNetwork, samples: Samples, folder: Path, settings: SegmentationConfig, runtime: Runtime
) -> None:
    """Segment a split into palette PNGs, ``<image_id>.png``; existing files are skipped.

    Several processes (:mod:`smaflib.processes`) share the images.
    """
    names = [f"{image_id}.png" for image_id in samples.image_ids]
    missing = missing_files(folder, names)
    masks = segment_many(network, samples, settings, runtime, missing, f"segment {samples.split}")
    for index, mask in zip(missing, masks, strict=True):
        save_mask(folder / names[index], mask)
