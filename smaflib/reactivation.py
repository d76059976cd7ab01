"""Stage 3: denoise the fused maps with the image label, then reactivate them into the student's targets.

Section 3.3 of the paper. Both are one line of arithmetic each, which is the point: the image label is certain and free,
and dividing a pixel by its strongest score makes a weakly activated body as certain as the strongly activated head.
"""

import torch
from torch import Tensor

from smaflib.data.masks import strongest


def denoise(fused: Tensor, image_label: Tensor) -> Tensor:
    """Set the maps, (..., K, H, W) in [0, 1], to zero for classes that the image label, (..., K) in {0, 1}, lacks.

    ValueError if the label does not match.

    Example:
        >>> fused = torch.tensor([[[0.75, 0.25]], [[0.5, 1.0]]])  # two classes, one row of two pixels
        >>> denoise(fused, image_label=torch.tensor([1.0, 0.0])).tolist()
        [[[0.75, 0.25]], [[0.0, 0.0]]]
    """
    if image_label.shape != fused.shape[:-2]:
        shapes = f"{tuple(image_label.shape)} does not match the maps {tuple(fused.shape)}"
        raise ValueError(f"image_label {shapes}; the background has no image label")
    return fused * image_label.to(fused)[..., None, None]


def blend_saliency(denoised: Tensor, saliency: Tensor, weight: float) -> Tensor:
    """Trust a saliency map with a share of each score: what is salient gains, what is not loses.

    The salient share of a pixel goes to its classes in proportion, the whole of it to the strongest. Saliency knows
    borders and no classes, attention knows classes and no borders. The paper does not do this: its rule is weight 0.

    Maps (K, H, W), saliency (H, W) and weight are in [0, 1], and so is the result, (K, H, W).

    Example:
        >>> blend_saliency(torch.tensor([[[0.5, 0.5]]]), saliency=torch.tensor([[1.0, 0.0]]), weight=0.5).tolist()
        [[[0.75, 0.25]]]
    """
    strongest = denoised.amax(dim=-3, keepdim=True)
    share = denoised / strongest.clamp(min=torch.finfo(denoised.dtype).tiny)
    return (1 - weight) * denoised + weight * saliency * share


def reactivate(denoised: Tensor, bg_score: float) -> Tensor:
    """Divide every pixel by its strongest score, a constant background included: the winner becomes 1.

    Denoised maps, (..., K, H, W) in [0, 1], become (..., K+1, H, W) in [0, 1], background first. Where the background
    is strongest, every class stays below 1. The ratios inside a pixel stay, and its scores need not sum to 1.

    ValueError if ``bg_score`` is not in (0, 1]: with 0, a pixel without any class would be divided by 0.

    Example:
        >>> reactivate(torch.tensor([[[0.5, 0.125]]]), bg_score=0.25).tolist()
        [[[0.5, 1.0]], [[1.0, 0.5]]]
    """
    if not 0 < bg_score <= 1:
        raise ValueError(f"bg_score must be in (0, 1], got {bg_score}")
    scores = with_background_score(denoised, bg_score)
    return scores / scores.amax(dim=-3, keepdim=True)


def hard_targets(denoised: Tensor, bg_score: float) -> Tensor:
    """What :func:`reactivate` gives, with 0 for all but the strongest score: targets that a softmax can reach.

    The scores of a reactivated pixel sum to more than 1 wherever a second one is above 0, those of a softmax never do.
    The paper does not do this. Of equal scores the first is 1.

    Example:
        >>> hard_targets(torch.tensor([[[0.5, 0.125]]]), bg_score=0.25).tolist()
        [[[0.0, 1.0]], [[1.0, 0.0]]]
    """
    scores = with_background_score(denoised, bg_score)
    return torch.zeros_like(scores).scatter_(-3, scores.argmax(dim=-3, keepdim=True), 1.0)


def with_background_score(denoised: Tensor, bg_score: float) -> Tensor:
    """Put a constant background map before the class maps: (..., K, H, W) to (..., K+1, H, W).

    Example:
        >>> with_background_score(torch.tensor([[[0.5, 0.125]]]), bg_score=0.25).tolist()
        [[[0.25, 0.25]], [[0.5, 0.125]]]
    """
    background = torch.full_like(denoised[..., :1, :, :], bg_score)
    return torch.cat([background, denoised], dim=-3)


def hard_labels(denoised: Tensor, bg_score: float) -> Tensor:
    """The mask before refinement: the strongest class of each pixel, background where none exceeds ``bg_score``.

    Maps (K, H, W) become a mask, uint8 (H, W).

    Example:
        >>> hard_labels(torch.tensor([[[0.5, 0.125]]]), bg_score=0.25).tolist()
        [[1, 0]]
    """
    return strongest(with_background_score(denoised, bg_score))[1].to(torch.uint8)
