"""Unary energies of a dense CRF: the probability of each label at a pixel, regardless of the other pixels."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from smaflib.config import CrfConfig

SMALLEST_PROBABILITY = 1e-5  # scores of 0 have no logarithm; pydensecrf's own helper clips at the same value


@dataclass(frozen=True)
class Unary:
    """Unary energies of all pixels, by channel.

    A channel is one label, or all labels that are absent from the image. Absent labels have equal probabilities, so
    mean field on their sum is exact if its energy and compatibility account for their number. Of VOC's 21 labels an
    image usually has two or three.
    """

    energies: Tensor  # float32 (C, H, W), negative log probabilities of the channels, up to a constant per pixel
    labels: Tensor  # (C,) ascending; the label of each channel, in a merged channel the lowest
    counts: Tensor  # float32 (C,), number of labels in each channel

    def argmax_labels(self, probabilities: Tensor) -> Tensor:
        """The most probable label of each pixel, the lower one where two are equal: (C, H, W) to uint8 (H, W)."""
        each = probabilities / self.counts[:, None, None]
        return self.labels[each.max(dim=0).indices].to(torch.uint8)


def hard_unary(labels: Tensor, num_labels: int, params: CrfConfig) -> Unary:
    """A pixel's label, integer (H, W) in [0, num_labels), has ``gt_prob``; the other labels share the rest.

    With ``params.labels == "present"`` only background and the labels that occur are eligible.
    """
    # bincount is many times faster than unique(), which sorts the pixels.
    occurs = torch.bincount(labels.flatten().long(), minlength=num_labels) > 0
    occurs[0] |= params.labels == "present"
    present = occurs.nonzero()[:, 0]
    total = len(present) if params.labels == "present" else num_labels
    rest = -math.log((1 - params.gt_prob) / max(1, total - 1))
    energies = torch.where(labels == present[:, None, None], -math.log(params.gt_prob), rest).float()
    return _with_absent(energies, present, occurs, total, rest)


def soft_unary(scores: Tensor, params: CrfConfig) -> Unary:
    """Every label in proportion to its score, raised to ``params.sharpness``.

    Scores, float (L, H, W), are not negative and need not sum to 1, since only their ratios count. With
    ``params.labels == "present"`` only background and labels with a score in the image are eligible.
    """
    occurs = scores.flatten(1).amax(dim=1) > SMALLEST_PROBABILITY
    occurs[0] |= params.labels == "present"
    present = occurs.nonzero()[:, 0]
    energies = scores[present].float().clamp(min=SMALLEST_PROBABILITY).log().mul(-params.sharpness)
    total = len(present) if params.labels == "present" else len(scores)
    return _with_absent(energies, present, occurs, total, -math.log(SMALLEST_PROBABILITY) * params.sharpness)


def _with_absent(energies: Tensor, present: Tensor, occurs: Tensor, total: int, energy: float) -> Unary:
    """Add one channel for the absent labels, which all have ``energy`` everywhere."""
    counts = torch.ones(len(present), device=energies.device)
    num_absent = total - len(present)
    if not num_absent:
        return Unary(energies, present, counts)
    merged = energies.new_full((1, *energies.shape[1:]), energy - math.log(num_absent))
    present = torch.cat([present, (~occurs).nonzero()[0]])
    energies, counts = torch.cat([energies, merged]), torch.cat([counts, counts.new_tensor([num_absent])])
    order = present.argsort()
    return Unary(energies[order], present[order], counts[order])
