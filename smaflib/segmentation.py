"""Stage 6: an ordinary segmentation network, trained on the pseudo masks as if a person had drawn them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from torch import Tensor, nn

from smaflib.classifier import standardize_features
from smaflib.config import Config, CrfConfig, SegmentationConfig
from smaflib.data.classes import VOID_LABEL
from smaflib.data.masks import MaskFiles, save_mask
from smaflib.data.sample import Sample, Samples
from smaflib.data.transforms import Crop, normalize
from smaflib.models.networks import AttentionNetwork, SegmentationNetwork
from smaflib.refinement import dense_crf, refine_many
from smaflib.runtime import Runtime, derive_seed, device_of, num_cores, progress
from smaflib.training import Batch, Batches, History, fit


def train_segmenter(
    samples: Samples,
    masks: Sequence[Tensor],
    config: Config,
    runtime: Runtime,
    checkpoint: Path | None = None,
    student: AttentionNetwork | None = None,
) -> tuple[SegmentationNetwork, History]:
    """Train a segmentation network.

    Args:
        samples: the training split.
        masks: per sample uint8 (H, W): pseudo masks, or the ground truth for the upper bound; 255 does not count.
        config: of the run.
        runtime: device, precision and seed.
        checkpoint: where weights are kept; an unfinished training goes on from there.
        student: where given, the network starts from its features, which have seen image labels only.

    Returns:
        The network in eval mode and its learning curve.
    """
    network = new_segmenter(config, len(samples.class_names), runtime)
    if student is not None:
        network.backbone.load_state_dict(student.backbone.state_dict())

    def crop_mask(sample: Sample, index: int, crop: Crop) -> dict[str, Tensor]:
        return {"mask": crop.apply(masks[index], "nearest", fill=VOID_LABEL)}

    batches = Batches(
        samples, config.segmentation, derive_seed(runtime.seed, "segmenter"), crop_mask, config.data.num_workers
    )
    if network.config.freeze_backbone and not (checkpoint and checkpoint.is_file()):
        standardize_features(network, batches, runtime)

    def loss(batch: Batch) -> dict[str, Tensor]:
        views = multi_scale_logits(network, batch["image"], config.segmentation.loss_scales)
        return {"L_seg": torch.stack([segmentation_loss(logits, batch["mask"]) for logits in views]).sum()}

    history = fit(network, batches, loss, runtime, checkpoint, desc="segmentation")
    return network, history


def new_segmenter(config: Config, num_classes: int, runtime: Runtime) -> SegmentationNetwork:
    """The untrained network of stage 6, the same for the same seed."""
    torch.manual_seed(derive_seed(runtime.seed, "segmenter's initial weights"))
    model = config.segmentation.model or config.model
    return SegmentationNetwork(model, config.segmentation, num_classes).to(runtime.device)


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
        size = (max(1, round(images.shape[2] * scale)), max(1, round(images.shape[3] * scale)))
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
    losses = F.cross_entropy(upsampled, mask.long(), ignore_index=VOID_LABEL, reduction="sum")
    return losses / (mask != VOID_LABEL).sum().clamp(min=1)


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
    given = _crf_start(probabilities, config.test_crf)
    return dense_crf(image, given, config.test_crf, len(probabilities), device=runtime.device if runtime else None)


def _crf_start(probabilities: Tensor, crf: CrfConfig) -> Tensor:
    """What the CRF starts from: the probabilities (K+1, H, W), or the labels (H, W) that they make."""
    return probabilities if crf.unary == "scores" else probabilities.max(dim=0).indices


@torch.no_grad()
def class_probabilities(
    network: nn.Module, image: Tensor, config: SegmentationConfig, runtime: Runtime | None = None
) -> Tensor:
    """Softmax, averaged over the test scales and flips: float32 (K+1, H, W); arguments as of :func:`segment`."""
    network.eval()
    height, width = image.shape[-2:]
    total = torch.zeros(())
    for scale in config.test_scales:
        size = [max(1, round(height * scale)), max(1, round(width * scale))]
        inputs = normalize(TF.resize(image, size, TF.InterpolationMode.BICUBIC))[None].to(device_of(network))
        inputs = torch.cat([inputs, inputs.flip(-1)]) if config.test_flip else inputs
        with runtime.autocast() if runtime else torch.autocast("cpu", enabled=False):
            logits = network(inputs).float()
        logits = F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)
        probabilities = logits.softmax(dim=1)
        if config.test_flip:
            probabilities = (probabilities[:1] + probabilities[1:].flip(-1)) / 2
        total = total + probabilities[0].cpu()
    return total / len(config.test_scales)


def segment_many(
    network: SegmentationNetwork, images: Iterable[Tensor], num_images: int, config: Config, runtime: Runtime
) -> Iterator[Tensor]:
    """:func:`segment` of many images, in their order; the CRF, if there is one, on the other cores or on the GPU.

    Args:
        network: gives (B, K+1, h, w) logits.
        images: uint8 (3, H, W) each, taken as there is room.
        num_images: of them; a few do not pay for starting processes.
        config: of the run.
        runtime: device and precision.

    Yields:
        uint8 (H, W) per image.
    """
    settings = config.segmentation
    if settings.test_crf is None:
        yield from (segment(network, image, settings, runtime) for image in images)
        return
    crf = settings.test_crf
    jobs = ((image, _crf_start(class_probabilities(network, image, settings, runtime), crf)) for image in images)
    masks, workers = config.pseudo_masks, 1 if num_images < 8 else config.pseudo_masks.num_workers or num_cores()
    yield from refine_many(jobs, crf, network.num_classes + 1, workers, masks.backend, runtime.device)


def write_segmentation(
    network: SegmentationNetwork, samples: Samples, folder: Path, config: Config, runtime: Runtime
) -> MaskFiles:
    """Segment a split into palette PNGs; images that have theirs already are skipped.

    Args:
        network: trained.
        samples: the split.
        folder: takes ``<image_id>.png``.
        config: of the run.
        runtime: device and precision.
    """
    paths = [folder / f"{image_id}.png" for image_id in samples.image_ids]
    missing = [index for index, path in enumerate(paths) if not path.is_file()]
    masks = segment_many(network, (samples[index].image for index in missing), len(missing), config, runtime)
    for index, mask in zip(missing, progress(masks, len(missing), f"segment {samples.split}"), strict=True):
        save_mask(paths[index], mask)
    return MaskFiles(paths)
