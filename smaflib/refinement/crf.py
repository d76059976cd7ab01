"""Dense CRF: move the borders of a labelling to the edges of its image."""

import importlib.util

import numpy as np
import torch
from torch import Tensor

from smaflib.config import CrfBackend, CrfConfig
from smaflib.data.classes import VOID_LABEL
from smaflib.errors import ConfigError
from smaflib.refinement.mean_field import mean_field
from smaflib.refinement.unary import hard_unary, soft_unary

HAS_PYDENSECRF = importlib.util.find_spec("pydensecrf") is not None
"""It needs a compiler where there is no wheel; torch gives the same masks without it."""


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
        scores_or_labels: hard labels, integer (H, W) in [0, num_labels), or scores, float (num_labels, H, W), not
            negative: probabilities, or attention maps with the background threshold as first channel.
        params: kernels, iterations, and how sure a hard label or how sharp a score is.
        num_labels: K+1; needed for hard labels.
        backend: ``pydensecrf`` (CPU), ``torch`` (any device), or ``auto``: torch on a CUDA GPU, pydensecrf on the CPU
            where it is installed, else torch on the CPU. All give the same mask, except for one pixel in many thousands
            whose two best labels are equally probable.
        device: where torch computes; by default where ``image`` is.

    Returns uint8 (H, W), the most probable label of each pixel, on the device of ``image``. ValueError if shapes or
    labels do not fit, ConfigError if pydensecrf is asked for and not installed.

    Source: Kraehenbuehl and Koltun, "Efficient inference in fully connected CRFs", NIPS 2011.

    Example:
        >>> image = torch.zeros(3, 8, 8, dtype=torch.uint8)
        >>> image[:, :, 4:] = 255  # black, then white
        >>> labels = (image[0] > 0).long()
        >>> labels[2, 2] = 1  # wrong
        >>> dense_crf(image, labels, CrfConfig(), num_labels=2, backend="torch")[2].tolist()
        [0, 0, 0, 0, 1, 1, 1, 1]
    """
    _check(image, scores_or_labels, num_labels)
    home = image.device
    backend, place = choose_backend(backend, torch.device(device) if device is not None else home)
    image, given = image.to(place), scores_or_labels.to(place)
    unary = hard_unary(given, num_labels or 0, params) if given.dim() == 2 else soft_unary(given, params)
    infer = pydensecrf_mean_field if backend == "pydensecrf" else mean_field
    return unary.argmax_labels(infer(image, unary.energies, unary.counts, params)).to(home)


def choose_backend(backend: CrfBackend, device: torch.device) -> tuple[CrfBackend, torch.device]:
    """Resolve ``auto``; with the device on which the back-end computes. An error if pydensecrf is not installed."""
    if backend == "torch" or (backend == "auto" and device.type == "cuda"):
        return "torch", device
    if backend == "pydensecrf" and not HAS_PYDENSECRF:
        raise ConfigError("the back-end pydensecrf is not installed: pip install pydensecrf2, or set backend=torch")
    # The lattice is not tested on other GPUs than CUDA's.
    return ("pydensecrf" if HAS_PYDENSECRF else "torch"), torch.device("cpu")


def pydensecrf_mean_field(image: Tensor, energies: Tensor, counts: Tensor, params: CrfConfig) -> Tensor:
    """:func:`~smaflib.refinement.mean_field.mean_field` by pydensecrf: compiled, on one CPU core."""
    import pydensecrf.densecrf as densecrf

    channels, height, width = energies.shape
    if channels == 1:  # pydensecrf would divide by zero
        return torch.ones_like(energies)
    crf = densecrf.DenseCRF2D(width, height, channels)
    crf.setUnaryEnergy(energies.reshape(channels, -1).contiguous().numpy())
    # A vector is the diagonal of the compatibility matrix; pydensecrf adds it where it would subtract a number.
    crf.addPairwiseGaussian(sxy=params.gaussian_sxy, compat=(-params.gaussian_compat / counts).numpy())
    crf.addPairwiseBilateral(
        sxy=params.bilateral_sxy,
        srgb=params.bilateral_srgb,
        rgbim=np.array(image.permute(1, 2, 0).numpy(), order="C", copy=True),  # writable and contiguous
        compat=(-params.bilateral_compat / counts).numpy(),
    )
    return torch.from_numpy(np.array(crf.inference(params.iterations))).reshape(energies.shape)


def _check(image: Tensor, given: Tensor, num_labels: int | None) -> None:
    hard = given.dim() == 2
    if given.shape[-2:] != image.shape[-2:] or image.dtype != torch.uint8:
        found = f"{image.dtype} {tuple(image.shape)}"
        raise ValueError(f"the CRF needs a uint8 image of the size of {tuple(given.shape)}, got {found}")
    if hard and (num_labels is None or int(given.max()) >= min(num_labels, VOID_LABEL)):
        raise ValueError(f"label {int(given.max())} is not below num_labels={num_labels}; void has no unary")
    if not hard and not (len(given) <= VOID_LABEL and bool((given.isfinite() & (given >= 0)).all())):
        raise ValueError("the CRF needs finite scores of 0 or more, of 255 labels at most; apply softmax or ReLU first")
