"""Dense CRF on the CPU, through pydensecrf."""

from __future__ import annotations

import numpy as np
import pydensecrf.densecrf as densecrf
import torch
from pydensecrf.utils import unary_from_labels, unary_from_softmax
from torch import Tensor

from smaflib.config import CrfConfig


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
    if hard and params.labels == "present" and labels > 2:
        present = torch.cat([scores_or_labels.new_zeros(1), scores_or_labels.flatten()]).unique()
        if len(present) == 1:
            return scores_or_labels.to(torch.uint8)
        if len(present) < labels:
            compact = torch.searchsorted(present, scores_or_labels.contiguous())
            return present.to(torch.uint8)[dense_crf(image, compact, params, len(present)).long()]
    height, width = image.shape[-2:]
    crf = densecrf.DenseCRF2D(width, height, labels)
    given = scores_or_labels.cpu().numpy()
    unary = (
        unary_from_labels(given.astype(np.int64), labels, params.gt_prob, zero_unsure=False)
        if hard
        else unary_from_softmax(given)
    )
    crf.setUnaryEnergy(np.ascontiguousarray(unary, dtype=np.float32))
    crf.addPairwiseGaussian(sxy=params.gaussian_sxy, compat=params.gaussian_compat)
    # pydensecrf refuses read-only and non-contiguous pictures.
    colors = np.array(image.permute(1, 2, 0).cpu().numpy(), order="C", copy=True)
    crf.addPairwiseBilateral(
        sxy=params.bilateral_sxy, srgb=params.bilateral_srgb, rgbim=colors, compat=params.bilateral_compat
    )
    probabilities = np.array(crf.inference(params.iterations))
    return torch.from_numpy(probabilities.argmax(axis=0).astype(np.uint8).reshape(height, width))
