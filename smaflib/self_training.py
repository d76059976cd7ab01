"""Stage 4: the student learns to predict in one forward pass what the teacher's fused and denoised maps say.

Section 3.4 of the paper. The teacher is frozen and its maps are computed once; the student starts from its weights.
"""

from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from smaflib.config import SelfTrainingConfig
from smaflib.data.sample import Samples
from smaflib.models.networks import Network, with_background
from smaflib.reactivation import hard_targets, reactivate, with_background_score
from smaflib.runtime import Runtime, derive_seed
from smaflib.training import Batch, Batches, CropField, History, fit

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
) -> tuple[Network, History]:
    """Train a student on the teacher's denoised maps, which are reactivated crop by crop.

    Reactivation comes after cropping: outside the image there is no attention, so the padding becomes background.

    Args:
        teacher: is not changed; an :class:`~smaflib.models.networks.AttentionNetwork`, or any module that returns logit
            maps (B, K+1, h, w), background first.
        samples: the training split; masks are not read.
        denoised: per sample (K, H, W) in [0, 1]; may be lazy (:class:`~smaflib.maps.FusedMaps`).
        bg_score: background threshold of the targets.
        checkpoint: file of the weights; an unfinished training resumes from it.

    Returns the student in eval mode and its learning curve.
    """
    student = with_background(teacher).to(runtime.device)
    if settings.fresh_head:
        nn.init.zeros_(student.head.weight)  # type: ignore[union-attr, arg-type]
    make_target = hard_targets if settings.targets == "hard" else reactivate
    if not settings.reactivate:
        make_target = with_background_score

    def loss(batch: Batch) -> dict[str, Tensor]:
        side = batch["image"].shape[-1] // TARGET_STRIDE
        maps = F.interpolate(batch["denoised"], size=(side, side), mode="bilinear", align_corners=True)
        return {"L_mac": mac_loss(student(batch["image"]), make_target(maps, bg_score), settings.loss_weight)}

    seed = derive_seed(runtime.seed, "student")
    batches = Batches(samples, settings, seed, CropField("denoised", denoised))
    return student, fit(student, batches, loss, runtime, checkpoint, stage="self_training")


def mac_loss(logits: Tensor, target: Tensor, weight: float = 100.0) -> Tensor:
    """L_mac: mean squared error between the student's softmax and the reactivated target.

    Logits (B, K+1, h, w) are upsampled (bilinear, corners aligned) to the target, (B, K+1, H, W) in [0, 1]; both have
    the background first. The weight is that of the reference code.

    Example:
        >>> import torch
        >>> target = torch.zeros(1, 2, 8, 8)
        >>> target[:, 0] = 1  # all background; the student is undecided, 0.5 off in both channels
        >>> mac_loss(torch.zeros(1, 2, 4, 4), target).item()
        25.0
    """
    upsampled = F.interpolate(logits.float(), size=target.shape[2:], mode="bilinear", align_corners=True)
    return weight * F.mse_loss(upsampled.softmax(dim=1), target)
