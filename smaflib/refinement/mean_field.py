"""Dense CRF inference in torch, on any device.

Every pixel has a probability per label. In each iteration it moves towards the mean of all other pixels, weighted by
two Gaussian kernels: *smoothness*, of position, and *appearance*, of position and colour. The Potts model only rewards
agreement, so the message of a label is that label's filtered probability.

Source: Kraehenbuehl and Koltun, "Efficient inference in fully connected CRFs with Gaussian edge potentials", NIPS
2011, algorithm 1.
"""

import functools

import torch
from torch import Tensor

from smaflib.config import CrfConfig
from smaflib.refinement.lattice import Lattice, build_lattice, gaussian_filter, normalize


def mean_field(image: Tensor, energies: Tensor, counts: Tensor, params: CrfConfig) -> Tensor:
    """Probabilities of the labels after ``params.iterations``: float32 (C, H, W), summing to 1 over the channels.

    Args:
        image: uint8 (3, H, W).
        energies: float32 (C, H, W), negative log probabilities.
        counts: (C,), how many labels a channel stands for (see :class:`~smaflib.refinement.unary.Unary`).
    """
    smoothness = smoothness_kernel(*image.shape[1:], params.gaussian_sxy, image.device)
    kernels = ((params.gaussian_compat, smoothness), (params.bilateral_compat, appearance_kernel(image, params)))
    logits, shares = -energies.flatten(1), (1 / counts)[:, None]  # (C, N), (C, 1)
    probabilities = torch.softmax(logits, dim=0)
    for _ in range(params.iterations):
        # The lattice gathers a pixel's values faster from (N, C); softmax is faster on (C, N).
        values = probabilities.T.contiguous()
        message = torch.zeros_like(values)
        for compatibility, lattice in kernels:
            message.add_(gaussian_filter(lattice, values), alpha=compatibility)
        probabilities = torch.softmax(torch.addcmul(logits, message.T, shares), dim=0)
    return probabilities.reshape(energies.shape)


@functools.lru_cache(maxsize=4)
def smoothness_kernel(height: int, width: int, sxy: float, device: torch.device) -> Lattice:
    """The lattice of pixel positions, 13 MB for 512 x 512; most photos of a data set have one of few sizes."""
    return normalize(build_lattice(positions(height, width, device) / torch.tensor(sxy, device=device)))


def appearance_kernel(image: Tensor, params: CrfConfig) -> Lattice:
    """The lattice of pixel positions and colours: uint8 (3, H, W)."""
    height, width = image.shape[-2:]
    # Divided by tensors: torch would multiply by the reciprocal of a Python number, and get other last bits.
    place = positions(height, width, image.device) / torch.tensor(params.bilateral_sxy, device=image.device)
    color = image.reshape(3, -1).float() / torch.tensor(params.bilateral_srgb, device=image.device)
    return normalize(build_lattice(torch.cat([place, color])))


def positions(height: int, width: int, device: torch.device) -> Tensor:
    """float32 (2, H * W): x and y of each pixel, in pixels."""
    sides = (torch.arange(side, dtype=torch.float32, device=device) for side in (height, width))
    y, x = torch.meshgrid(*sides, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()])


def kernels_seen_from(image: Tensor, row: int, column: int, params: CrfConfig) -> tuple[Tensor, Tensor]:
    """Smoothness and appearance kernel of one pixel of an image (3, H, W), exact, for figures and tests.

    They are the weights of all pixels, float32 (H, W) in [0, 1] each; 1 at the pixel itself.
    """
    height, width = image.shape[-2:]
    place = positions(height, width, image.device).view(2, height, width)
    distance = (place - place[:, row, column, None, None]).square().sum(dim=0)
    colors = image.float()
    difference = (colors - colors[:, row, column, None, None]).square().sum(dim=0)
    smoothness = torch.exp(-distance / (2 * params.gaussian_sxy**2))
    appearance = torch.exp(-distance / (2 * params.bilateral_sxy**2) - difference / (2 * params.bilateral_srgb**2))
    return smoothness, appearance
