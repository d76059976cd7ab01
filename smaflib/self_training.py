"""Stage 4: the student learns to give in one forward pass what the teacher's fused and denoised maps say.

Section 3.4 of the paper. The teacher is frozen and its maps are made once; the student starts from its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smaflib.config import SelfTrainingConfig
from smaflib.data.sample import Samples
from smaflib.errors import ConfigError
from smaflib.models.networks import Network, with_background
from smaflib.reactivation import hard_targets, reactivate
from smaflib.runtime import Runtime, derive_seed
from smaflib.training import Batch, Batches, CropField, CropFieldsTogether, History, fit

TargetRule = Callable[[Tensor, float], Tensor]
"""From denoised maps (B, K, h, w) and the background score to a target (B, K+1, h, w)."""

TARGET_STRIDE = 4
"""Student and target meet at a quarter of the crop's side (reference code: 112 of 448)."""


def self_train(
    teacher: Network,
    samples: Samples,
    denoised: Sequence[Tensor],
    settings: SelfTrainingConfig,
    bg_score: float,
    runtime: Runtime,
    *,
    checkpoint: Path | None = None,
    make_target: TargetRule | None = None,
    target_stride: int = TARGET_STRIDE,
    pixel_weights: Sequence[Tensor] | None = None,
    num_workers: int = 0,
) -> tuple[Network, History]:
    """Train a student on the teacher's denoised maps, which are reactivated crop by crop.

    Reactivation comes after cropping, because what lies outside the image has no attention and so becomes background.

    Args:
        teacher: stays as it is; :class:`~smaflib.models.networks.AttentionNetwork`, or any module that gives logit maps
            (B, K+1, h, w), background first.
        samples: the training split; masks are not read.
        denoised: per sample (K, H, W) in [0, 1]; may be lazy (:class:`~smaflib.maps.DenoisedMaps`).
        settings: of stage 4.
        bg_score: the background's score in the targets.
        runtime: device, precision and seed.
        checkpoint: where weights are kept; an unfinished training resumes from there.
        make_target: what a crop's maps become; None: what ``settings.targets`` says. Only the ablation takes another.
        target_stride: the crop's side over the target's.
        pixel_weights: per sample (H, W), not negative: how much each pixel counts in the loss; what lies outside the
            image counts 1. None: all alike, as in the paper.
        num_workers: loader processes.

    Returns:
        The student in eval mode and its learning curve.

    Raises:
        ConfigError: if ``settings.fresh_head`` is set and the network has no ``head``.
        ValueError: if the network's logit maps do not fit the targets.
    """
    student = with_background(teacher).to(runtime.device)
    if settings.fresh_head:
        head = getattr(student, "head", None)
        if not isinstance(head, nn.Conv2d):
            raise ConfigError(
                f"self_training.fresh_head needs a network with a head; {type(teacher).__name__} has none"
            )
        nn.init.zeros_(head.weight)
    rule = make_target or (hard_targets if settings.targets == "hard" else reactivate)
    seed = derive_seed(runtime.seed, "student")
    fields = [CropField("denoised", denoised)]
    if pixel_weights is not None:
        fields.append(CropField("pixel_weights", pixel_weights, fill=1))
    batches = Batches(samples, settings, seed, CropFieldsTogether(fields), num_workers)

    def weights_of(batch: Batch) -> Tensor:  # (B, side, side), of the target
        return _at_side(batch["pixel_weights"][:, None], batch["image"].shape[-1] // target_stride)[:, 0]

    def loss(batch: Batch) -> dict[str, Tensor]:
        target = rule(_at_side(batch["denoised"], batch["image"].shape[-1] // target_stride), bg_score)
        weights = None if pixel_weights is None else weights_of(batch)
        return {"L_mac": mac_loss(student(batch["image"]), target, settings.loss_weight, weights)}

    # A process's part of a batch counts by the weight of its pixels, as in one process.
    num_terms = None if pixel_weights is None else (lambda batch: weights_of(batch).sum())
    history = fit(student, batches, loss, runtime, checkpoint, desc="self-training", num_terms=num_terms)
    return student, history


def _at_side(field: Tensor, side: int) -> Tensor:  # (B, C, H, W) -> (B, C, side, side)
    return F.interpolate(field, size=(side, side), mode="bilinear", align_corners=True)


def mac_loss(logits: Tensor, target: Tensor, weight: float = 100.0, pixel_weights: Tensor | None = None) -> Tensor:
    """L_mac: mean squared error between the student's softmax and the reactivated target.

    Args:
        logits: (B, K+1, h, w), background first; upsampled (bilinear, corners aligned) to the target's size.
        target: (B, K+1, H, W) in [0, 1], background first.
        weight: the loss's factor; 100 in the reference code.
        pixel_weights: (B, H, W), not negative: the mean is a weighted one, so that only their ratios count; zero
            everywhere gives a loss of 0.

    Returns:
        Scalar.

    Raises:
        ValueError: if they disagree on K+1.

    Example:
        >>> import torch
        >>> target = torch.zeros(1, 2, 8, 8)
        >>> target[:, 0] = 1  # all background; the student is undecided, 0.5 off in both channels
        >>> mac_loss(torch.zeros(1, 2, 4, 4), target).item()
        25.0
    """
    if logits.shape[1] != target.shape[1]:
        raise ValueError(
            f"the student gives {logits.shape[1]} logit maps where the target has {target.shape[1]}: one for the "
            "background, first, and one per class"
        )
    upsampled = F.interpolate(logits.float(), size=target.shape[2:], mode="bilinear", align_corners=True)
    if pixel_weights is None:
        return weight * F.mse_loss(upsampled.softmax(dim=1), target)
    errors = F.mse_loss(upsampled.softmax(dim=1), target, reduction="none").mean(dim=1)
    return weight * (errors * pixel_weights).sum() / pixel_weights.sum().clamp_min(torch.finfo(errors.dtype).tiny)
