"""Dense CRF inference by pydensecrf, the field's usual implementation: compiled, one image, one CPU core."""

from __future__ import annotations

import importlib.util

import numpy as np
import torch
from torch import Tensor

from smaflib.config import CrfConfig

INSTALLED = importlib.util.find_spec("pydensecrf") is not None
"""It needs a compiler where there is no wheel; the torch back-end gives the same masks without."""


def mean_field(image: Tensor, energies: Tensor, counts: Tensor, params: CrfConfig) -> Tensor:
    """Probabilities of the labels after ``params.iterations``; arguments as of the torch back-end, on the CPU.

    Args:
        image: uint8 (3, H, W).
        energies: float32 (C, H, W), negative log probabilities.
        counts: (C,), how many labels a channel stands for.
        params: kernels and iterations.

    Returns:
        float32 (C, H, W), summing to 1 over the channels.
    """
    import pydensecrf.densecrf as densecrf

    channels, height, width = energies.shape
    crf = densecrf.DenseCRF2D(width, height, channels)
    crf.setUnaryEnergy(energies.reshape(channels, -1).contiguous().numpy())

    def compatibility(weight: float) -> np.ndarray:
        # A vector is the diagonal of the compatibility matrix, and pydensecrf adds it where it subtracts a number.
        return (-weight / counts).numpy()

    crf.addPairwiseGaussian(sxy=params.gaussian_sxy, compat=compatibility(params.gaussian_compat))
    # pydensecrf refuses read-only and non-contiguous pictures.
    colors = np.array(image.permute(1, 2, 0).numpy(), order="C", copy=True)
    crf.addPairwiseBilateral(
        sxy=params.bilateral_sxy,
        srgb=params.bilateral_srgb,
        rgbim=colors,
        compat=compatibility(params.bilateral_compat),
    )
    return torch.from_numpy(np.array(crf.inference(params.iterations))).reshape(channels, height, width)
