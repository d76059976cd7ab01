"""Dense CRF: move the borders of a labelling to the edges of its image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smaflib.config import CrfBackend, CrfConfig
from smaflib.errors import ConfigError
from smaflib.refinement import mean_field, pydensecrf_backend
from smaflib.refinement.unary import Unary, hard_unary, soft_unary


def dense_crf(
    image: Tensor,
    scores_or_labels: Tensor,
    params: CrfConfig,
    num_labels: int | None = None,
    backend: CrfBackend = "auto",
    device: torch.device | str | None = None,
) -> Tensor:
    """Move the borders of a labelling to the edges of its image.

    Args:
        image: uint8 (3, H, W), the original colours.
        scores_or_labels: hard labels, an integer (H, W) in [0, num_labels), or scores, float (num_labels, H, W), not
            negative: probabilities, or attention maps behind a background score.
        params: kernels, iterations, and how sure a hard label or how sharp a score is.
        num_labels: for hard labels: how many there are (K+1); at least 2.
        backend: ``pydensecrf`` (CPU), ``torch`` (any device), or ``auto``: torch on a CUDA GPU, pydensecrf on the CPU
            where it is installed, else torch on the CPU. All give the same mask, but for a pixel in many thousands
            whose two best labels are equally probable.
        device: where torch computes; by default where ``image`` is.

    Returns:
        uint8 (H, W), the most probable label of each pixel, on the device of ``image``.

    Raises:
        ValueError: if shapes or labels do not fit.
        ConfigError: if pydensecrf is asked for and not installed.

    Source: Kraehenbuehl and Koltun, "Efficient inference in fully connected CRFs", NIPS 2011; constants as in the
    reference code.

    Example:
        >>> image = torch.zeros(3, 8, 8, dtype=torch.uint8)
        >>> image[:, :, 4:] = 255  # black, then white
        >>> labels = (image[0] > 0).long()
        >>> labels[2, 2] = 1  # wrong
        >>> dense_crf(image, labels, CrfConfig(), num_labels=2, backend="torch")[2].tolist()
        [0, 0, 0, 0, 1, 1, 1, 1]
    """
    return dense_crf_batch([image], [scores_or_labels], params, num_labels, backend, device)[0]


def dense_crf_batch(
    images: Sequence[Tensor],
    scores_or_labels: Sequence[Tensor],
    params: CrfConfig,
    num_labels: int | None = None,
    backend: CrfBackend = "auto",
    device: torch.device | str | None = None,
) -> list[Tensor]:
    """:func:`dense_crf` of several images at once, of any sizes: what keeps a GPU busy.

    Args:
        images: uint8 (3, H, W) each.
        scores_or_labels: as for :func:`dense_crf`, one per image.
        params: as for :func:`dense_crf`.
        num_labels: as for :func:`dense_crf`.
        backend: as for :func:`dense_crf`; pydensecrf takes one image after the other.
        device: as for :func:`dense_crf`.

    Returns:
        uint8 (H, W) per image, on the images' device.
    """
    for image, given in zip(images, scores_or_labels, strict=True):
        _check(image, given, num_labels)
    if not images:
        return []
    home = images[0].device
    chosen_backend, place = choose_backend(backend, torch.device(device) if device is not None else home)
    infer = _with_pydensecrf if chosen_backend == "pydensecrf" else mean_field.mean_field
    images = [image.to(place) for image in images]
    unaries = [_unary(given.to(place), num_labels, params) for given in scores_or_labels]
    results = [unary.labels[0].to(torch.uint8).expand(unary.energies.shape[1:]).clone() for unary in unaries]
    # With one label there is nothing to choose, and pydensecrf divides by zero.
    open_ones = [index for index, unary in enumerate(unaries) if len(unary.energies) > 1]
    if open_ones:
        energies, counts = zip(*((unaries[index].energies, unaries[index].counts) for index in open_ones), strict=True)
        probabilities = infer([images[index] for index in open_ones], energies, counts, params)
        for index, each in zip(open_ones, probabilities, strict=True):
            results[index] = unaries[index].argmax_labels(each)
    return [result.to(home) for result in results]


def choose_backend(backend: CrfBackend, device: torch.device) -> tuple[CrfBackend, torch.device]:
    """``auto`` resolved, with the device on which the back-end computes.

    Raises:
        ConfigError: if pydensecrf is asked for and not installed.
    """
    cpu = torch.device("cpu")
    if backend == "auto":
        if device.type == "cuda":
            return "torch", device
        # The lattice is not tested on other GPUs than CUDA's; the back-end torch uses it there all the same.
        return ("pydensecrf" if pydensecrf_backend.INSTALLED else "torch"), cpu
    if backend == "torch":
        return backend, device
    if not pydensecrf_backend.INSTALLED:
        raise ConfigError(
            "the back-end 'pydensecrf' is not installed; install pydensecrf2 (it needs a C++ compiler), or set "
            "pseudo_masks.backend=torch, which gives the same masks"
        )
    return backend, cpu


def _with_pydensecrf(
    images: Sequence[Tensor], energies: Sequence[Tensor], counts: Sequence[Tensor], params: CrfConfig
) -> list[Tensor]:
    return [
        pydensecrf_backend.mean_field(image, energy, count, params)
        for image, energy, count in zip(images, energies, counts, strict=True)
    ]


def _unary(given: Tensor, num_labels: int | None, params: CrfConfig) -> Unary:
    return hard_unary(given, num_labels or 0, params) if given.dim() == 2 else soft_unary(given, params)


def _check(image: Tensor, given: Tensor, num_labels: int | None) -> None:
    hard = given.dim() == 2
    if image.dim() != 3 or given.dim() not in (2, 3) or given.shape[-2:] != image.shape[-2:]:
        raise ValueError(
            f"dense_crf needs an image (3, H, W) and labels (H, W) or scores (L, H, W) of its size, got "
            f"{tuple(image.shape)} and {tuple(given.shape)}"
        )
    if image.dtype != torch.uint8:
        raise ValueError(f"dense_crf needs the original uint8 colours, got an image of {image.dtype}")
    labels = (num_labels or 0) if hard else len(given)
    if labels < 2:
        raise ValueError(f"dense_crf chooses between at least 2 labels, got {labels}; pass num_labels with hard labels")
    if hard and int(given.max()) >= labels:
        raise ValueError(f"label {int(given.max())} is not below num_labels={labels}; void has no unary")
    if not hard and not bool((given >= 0).all()):  # nan, too
        raise ValueError("dense_crf needs scores of 0 or more, got negative ones or nan; apply softmax or ReLU first")
