"""Stage 4: the student learns to give at one scale, in one look, what the teacher's fused and refined maps say.

Section 3.4 of the paper. The teacher is frozen and its maps are made once; the student starts from its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smaflib.cams import AttentionMaps
from smaflib.config import Config, FusionRule
from smaflib.data.sample import Sample, Samples
from smaflib.data.transforms import Crop
from smaflib.models.networks import AttentionNetwork, with_background
from smaflib.pseudo_masks import pseudo_masks
from smaflib.reactivation import denoise, reactivate
from smaflib.refinement.parallel import CPU
from smaflib.runtime import Runtime, derive_seed
from smaflib.training import Batch, Batches, History, fit

TargetRule = Callable[[Tensor, float], Tensor]
"""From clean maps (B, K, h, w) and the background score to a target (B, K+1, h, w)."""

TARGET_STRIDE = 4
"""Student and target meet at a quarter of the crop's side (reference code: 112 of 448)."""


def self_train(
    teacher: AttentionNetwork,
    samples: Samples,
    denoised: Sequence[Tensor],
    config: Config,
    runtime: Runtime,
    checkpoint: Path | None = None,
    make_target: TargetRule = reactivate,
) -> tuple[AttentionNetwork, History]:
    """Train a student on the teacher's denoised maps, which are reactivated crop by crop.

    Reactivation comes after cropping, because what lies outside the image has no attention and so becomes background.

    Args:
        teacher: stays as it is.
        samples: the training split; masks are not looked at.
        denoised: per sample (K, H, W) in [0, 1], fused and denoised; may be lazy (:class:`DenoisedMaps`).
        config: of the run.
        runtime: device, precision and seed.
        checkpoint: where weights are kept; an unfinished training goes on from there.
        make_target: what a crop's maps become; only the ablation takes another rule than reactivation.

    Returns:
        The student in eval mode and its learning curve.
    """
    settings, bg_score = config.self_training, config.attention.resolved_bg_score
    student = with_background(teacher).to(runtime.device)
    if settings.fresh_head:
        nn.init.zeros_(student.head.weight)

    def crop_denoised(sample: Sample, index: int, crop: Crop) -> dict[str, Tensor]:
        return {"denoised": crop.apply(denoised[index])}

    batches = Batches(samples, settings, derive_seed(runtime.seed, "student"), crop_denoised, config.data.num_workers)

    def loss(batch: Batch) -> dict[str, Tensor]:
        side = batch["image"].shape[-1] // TARGET_STRIDE
        attention = F.interpolate(batch["denoised"], size=(side, side), mode="bilinear", align_corners=True)
        target = make_target(attention, bg_score)
        return {"L_mac": mac_loss(student(batch["image"]), target, settings.loss_weight)}

    history = fit(student, batches, loss, runtime, checkpoint, desc="self-training")
    return student, history


def mac_loss(logits: Tensor, target: Tensor, weight: float = 100.0) -> Tensor:
    """L_mac: mean squared error between the student's softmax and the reactivated target.

    Args:
        logits: (B, K+1, h, w), background first; upsampled (bilinear, corners aligned) to the target's size.
        target: (B, K+1, H, W) in [0, 1], background first.
        weight: the loss's factor; 100 in the reference code.

    Returns:
        Scalar.
    """
    upsampled = F.interpolate(logits.float(), size=target.shape[2:], mode="bilinear", align_corners=True)
    return weight * F.mse_loss(upsampled.softmax(dim=1), target)


class DenoisedMaps(Sequence[Tensor]):
    """Fused and denoised maps of a split, read when asked for: what the student learns from.

    Args:
        maps: the teacher's attention maps.
        samples: the split, for order and image labels.
        rule: of the fusion.
        scales: which scales take part; None: all. One scale gives the control of the paper's claim.
        cached: keep what was read, in half precision.
        denoise: False leaves the maps of absent classes in, to show what denoising does.
    """

    def __init__(
        self,
        maps: AttentionMaps,
        samples: Samples,
        rule: FusionRule = "sum",
        scales: Sequence[float] | None = None,
        cached: bool = False,
        denoise: bool = True,
    ) -> None:
        self.maps, self.rule, self.scales, self.cached, self.denoise = maps, rule, scales, cached, denoise
        self.image_ids, self.image_labels = samples.image_ids, samples.image_labels
        self._cache: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        if index not in self._cache:
            label = self.image_labels[index]
            # Each class is fused by itself, so those that denoising erases need not be fused at all.
            classes = label.nonzero()[:, 0] if self.denoise else None
            fused = self.maps.fused(self.image_ids[index], self.rule, self.scales, classes)
            denoised = fused if classes is None else denoise(_in_place_of(fused, classes, len(label)), label)
            if not self.cached:
                return denoised
            self._cache[index] = denoised.half()
        return self._cache[index].float()


def _in_place_of(maps: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """(k, H, W) maps of some classes to (K, H, W), zero elsewhere."""
    whole = maps.new_zeros(num_classes, *maps.shape[1:])
    whole[classes] = maps
    return whole


def student_targets(
    samples: Samples, denoised: Sequence[Tensor], config: Config, device: torch.device = CPU
) -> Sequence[Tensor]:
    """What the student learns: the clean maps, or with ``refine: crf`` the masks that the dense CRF makes of them.

    A student of masks learns where its teacher's maps agree with the edges of the images. The masks are kept in memory,
    one byte per pixel.

    Args:
        samples: the training split.
        denoised: per sample (K, H, W) in [0, 1], fused and denoised.
        config: of the run.
        device: where torch refines; the CPU by default.

    Returns:
        Per sample (K, H, W) in [0, 1].
    """
    if config.self_training.refine == "none":
        return denoised
    settings = config.pseudo_masks
    masks = pseudo_masks(
        samples,
        denoised,
        config.attention.resolved_bg_score,
        settings.crf,
        settings.num_workers,
        "targets",
        settings.backend,
        device,
    )
    return MaskMaps([mask for _, mask in masks], len(samples.class_names))


class MaskMaps(Sequence[Tensor]):
    """Masks, uint8 (H, W) each, seen as class maps (K, H, W) of 0 and 1: targets of :func:`self_train`."""

    def __init__(self, masks: Sequence[Tensor], num_classes: int) -> None:
        self.masks, self.num_classes = masks, num_classes

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        return F.one_hot(self.masks[index].long(), self.num_classes + 1).permute(2, 0, 1)[1:].float()
