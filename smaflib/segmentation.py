"""Stage 6: an ordinary segmentation network, trained on the pseudo masks as if a person had drawn them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smaflib.classifier import standardize_features
from smaflib.config import ModelConfig, SegmentationConfig
from smaflib.data.classes import VOID_LABEL
from smaflib.data.masks import strongest
from smaflib.data.sample import Sample, Samples
from smaflib.data.transforms import scaled_size
from smaflib.data.views import load_views
from smaflib.models.networks import AttentionNetwork, SegmentationNetwork, SummedBranches
from smaflib.refinement import refine_many
from smaflib.runtime import Runtime, derive_seed, device_of, memory_advice, seeded
from smaflib.training import Batch, Batches, CropField, History, fit


def train_segmenter(
    samples: Samples,
    masks: Sequence[Tensor],  # per sample uint8 (H, W): pseudo masks, or the ground truth; 255 does not count
    model: ModelConfig,  # backbone and weights, unless settings.model names others
    settings: SegmentationConfig,
    runtime: Runtime,
    *,
    student: AttentionNetwork | None = None,  # the network starts from it, see start_as_student
    checkpoint: Path | None = None,  # file of the weights; an unfinished training resumes from it
) -> tuple[SegmentationNetwork, History]:
    """Train a segmentation network on a split; returns it in eval mode with its learning curve."""
    with seeded(derive_seed(runtime.seed, "segmenter's initial weights")):
        network = SegmentationNetwork(settings.model or model, settings, len(samples.class_names)).to(runtime.device)
    if student is not None:
        start_as_student(network, student)
    masks_field = CropField("mask", masks, "nearest", fill=VOID_LABEL)
    batches = Batches(samples, settings, derive_seed(runtime.seed, "segmenter"), masks_field)
    if network.config.freeze_backbone and not (checkpoint and checkpoint.is_file()):
        standardize_features(network, batches, runtime)

    def loss(batch: Batch) -> dict[str, Tensor]:
        views = multi_scale_logits(network, batch["image"], settings.loss_scales)
        return {"L_seg": torch.stack([segmentation_loss(logits, batch["mask"]) for logits in views]).sum()}

    def num_terms(batch: Batch) -> Tensor:
        return (batch["mask"] != VOID_LABEL).sum()

    return network, fit(network, batches, loss, runtime, checkpoint, stage="segmentation", num_terms=num_terms)


@torch.no_grad()
def start_as_student(network: SegmentationNetwork, student: AttentionNetwork) -> None:
    """Give a segmentation network the features of a student, and where its head allows it, the student's logits.

    DeepLab-V2's head is a sum of 3x3 convolutions. If each has its share of the student's 1x1 convolution in the middle
    and zeros around it, the network starts as the student and learns the neighbourhood from there. Other heads, and
    heads after ``model.head_channels``, start at random.
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
    """Logits of a batch at several scales, (B, K+1, h_s, w_s) each: the outputs on which DeepLab-V2 has a loss.

    Of several scales also their maximum, at the size of the largest.

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


def segment(
    network: SegmentationNetwork, image: Tensor, settings: SegmentationConfig, runtime: Runtime | None = None
) -> Tensor:
    """:func:`segment_many` of one image, uint8 (3, H, W); without a runtime in float32, where the network is."""
    sample, runtime = Sample("image", image, torch.zeros(0)), runtime or Runtime(device_of(network))
    return next(segment_many(network, [sample], settings, runtime, desc=""))


def segment_many(
    network: SegmentationNetwork,
    samples: Sequence[Sample],
    settings: SegmentationConfig,
    runtime: Runtime,
    indices: Sequence[int] | None = None,
    desc: str = "segment",
) -> Iterator[Tensor]:
    """The most probable label of each pixel, uint8 (H, W), of images or of some, after the CRF if there is one.

    The softmax is averaged over test scales and flips. The CRF runs on the other cores or on the GPU.
    """
    runtime.place(network).eval()
    crf = settings.test_crf

    def unrefined() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in load_views(samples, settings.test_scales, runtime, indices, desc):
            with memory_advice("lower segmentation.test_scales"):
                views = (_probabilities(network, view, batch.size, settings.test_flip, runtime) for view in batch.views)
                probabilities = sum(views, torch.zeros(())) / len(batch.views)  # (B, K+1, H, W)
            soft = crf is not None and crf.unary == "scores"
            given = probabilities if soft else strongest(probabilities, dim=1)[1].to(torch.uint8)
            yield from zip(batch.images, given.cpu(), strict=True)

    if crf is None:
        yield from (labels for _, labels in unrefined())
    else:
        workers, backend = settings.test_crf_workers, settings.test_crf_backend
        yield from refine_many(unrefined(), crf, network.num_classes + 1, workers, backend, runtime.device)


@torch.no_grad()
def _probabilities(network: nn.Module, images: Tensor, size: tuple[int, int], flip: bool, runtime: Runtime) -> Tensor:
    """Softmax of a batch at one scale, brought to the images' size: (B, K+1, H, W)."""
    with runtime.autocast():
        logits = network(torch.cat([images, images.flip(-1)]) if flip else images).float()
    probabilities = F.interpolate(logits, size=size, mode="bilinear", align_corners=False).softmax(dim=1)
    if not flip:
        return probabilities
    plain, mirrored = probabilities.chunk(2)
    return (plain + mirrored.flip(-1)) / 2
