"""Dense CRF on the CPU, through pydensecrf."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pydensecrf.densecrf as densecrf
import torch
from torch import Tensor

from smaflib.config import CrfConfig

SMALLEST_PROBABILITY = 1e-5
"""Soft scores of 0 have no logarithm; pydensecrf's own helper clips at the same value."""


def dense_crf(image: Tensor, scores_or_labels: Tensor, params: CrfConfig, num_labels: int | None = None) -> Tensor:
    """Move the borders of a labelling to the edges of its image.

    Args:
        image: uint8 (3, H, W), the original colours.
        scores_or_labels: hard labels, an integer (H, W) in [0, num_labels), or probabilities, float
            (num_labels, H, W) summing to 1 over the labels.
        params: kernels, iterations, and how sure a hard label is.
        num_labels: for hard labels: how many there are (K+1); at least 2.

    Returns:
        uint8 (H, W), the most probable label of each pixel.

    Raises:
        ValueError: if shapes or labels do not fit.

    Source: Kraehenbuehl and Koltun, "Efficient inference in fully connected CRFs", NIPS 2011; constants as in the
    reference code.
    """
    hard = scores_or_labels.dim() == 2
    if scores_or_labels.shape[-2:] != image.shape[-2:] or image.dtype != torch.uint8:
        raise ValueError(
            f"dense_crf needs a uint8 image and labels of its size, got {image.dtype} {tuple(image.shape)} and "
            f"{tuple(scores_or_labels.shape)}"
        )
    labels = (num_labels or 0) if hard else len(scores_or_labels)
    if labels < 2:
        raise ValueError(f"dense_crf chooses between at least 2 labels, got {labels}; pass num_labels with hard labels")
    if hard and int(scores_or_labels.max()) >= labels:
        raise ValueError(f"label {int(scores_or_labels.max())} is not below num_labels={labels}; void has no unary")
    unary = hard_unary(scores_or_labels.cpu(), labels, params) if hard else soft_unary(scores_or_labels.cpu())
    if len(unary.energies) == 1:
        return scores_or_labels.to(torch.uint8)
    return unary.winners(_mean_field(image, unary, params))


@dataclass(frozen=True)
class Unary:
    """What each pixel wants before it looks at others, by channel.

    A channel stands for one label, or for all labels that a mask does not hold: nothing tells those apart, so they
    share one probability, and mean field on their sum is exact once the sum's energy and compatibility allow for how
    many they are.

    Attributes:
        energies: float32 (C, H, W), negative log probabilities of the channels.
        labels: (C,) ascending; the label of each channel, of a merged one its lowest.
        counts: (C,) how many labels each channel stands for.
    """

    energies: Tensor
    labels: Tensor
    counts: Tensor

    def winners(self, probabilities: Tensor) -> Tensor:
        """The most probable label of each pixel, the lower one where two are equal: (C, H, W) to uint8 (H, W)."""
        each = probabilities / self.counts[:, None, None]
        return self.labels[each.argmax(dim=0)].to(torch.uint8)


def hard_unary(labels: Tensor, num_labels: int, params: CrfConfig) -> Unary:
    """A pixel's label has ``gt_prob``; the other labels share the rest.

    Args:
        labels: integer (H, W) in [0, num_labels).
        num_labels: how many there are; with ``params.labels == "present"`` only background and those that occur count.
        params: gives ``gt_prob`` and ``labels``.
    """
    # A bincount is many times as fast as unique(), which sorts the pixels.
    occurs = torch.bincount(labels.flatten().long(), minlength=num_labels) > 0
    occurs[0] |= params.labels == "present"
    present = occurs.nonzero()[:, 0]
    num_absent = 0 if params.labels == "present" else num_labels - len(present)
    total = len(present) + num_absent
    if total == 1:
        return Unary(torch.zeros(1, *labels.shape), present, torch.ones(1))
    rest = (1 - params.gt_prob) / (total - 1)
    energies = torch.where(labels == present[:, None, None], -math.log(params.gt_prob), -math.log(rest)).float()
    counts = torch.ones(len(present))
    if num_absent:
        merged = torch.full((1, *labels.shape), -math.log(rest) - math.log(num_absent))
        present = torch.cat([present, (~occurs).nonzero()[0]])
        energies, counts = torch.cat([energies, merged]), torch.cat([counts, torch.tensor([float(num_absent)])])
        order = present.argsort()
        present, energies, counts = present[order], energies[order], counts[order]
    return Unary(energies, present, counts)


def soft_unary(probabilities: Tensor) -> Unary:
    """Negative logarithms of float (L, H, W), each probability at least :data:`SMALLEST_PROBABILITY`."""
    energies = -probabilities.float().clamp(min=SMALLEST_PROBABILITY).log()
    return Unary(energies, torch.arange(len(probabilities)), torch.ones(len(probabilities)))


def _mean_field(image: Tensor, unary: Unary, params: CrfConfig) -> Tensor:
    """Probabilities (C, H, W) after ``params.iterations`` of mean field."""
    channels, height, width = unary.energies.shape
    crf = densecrf.DenseCRF2D(width, height, channels)
    crf.setUnaryEnergy(unary.energies.reshape(channels, -1).contiguous().numpy())

    def compatibility(weight: float) -> np.ndarray:
        # A vector is the diagonal of the compatibility matrix, and pydensecrf adds it where it subtracts a number.
        return (-weight / unary.counts).numpy()

    crf.addPairwiseGaussian(sxy=params.gaussian_sxy, compat=compatibility(params.gaussian_compat))
    # pydensecrf refuses read-only and non-contiguous pictures.
    colors = np.array(image.permute(1, 2, 0).cpu().numpy(), order="C", copy=True)
    crf.addPairwiseBilateral(
        sxy=params.bilateral_sxy,
        srgb=params.bilateral_srgb,
        rgbim=colors,
        compat=compatibility(params.bilateral_compat),
    )
    return torch.from_numpy(np.array(crf.inference(params.iterations))).reshape(channels, height, width)
