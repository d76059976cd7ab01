"""The permutohedral lattice: its filter against written-out Gaussian sums; masks are in test_refinement.py."""

from __future__ import annotations

import pytest
import torch
from helpers import generator
from torch import Tensor

from smaflib.refinement.lattice import build_lattice, gaussian_filter, normalize


def grid(height: int, width: int, sxy: float) -> Tensor:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x.flatten(), y.flatten()]) / sxy


def test_kernels_too_narrow_for_the_keys_are_refused() -> None:
    features = torch.randint(0, 256, (5, 4000), generator=generator(0)) / 0.01  # 2^17 steps in five dimensions
    with pytest.raises(ValueError, match="the kernels are too narrow for the lattice"):
        build_lattice(features)


def test_filter_comes_near_the_written_out_sums() -> None:
    features = grid(20, 26, 3.0)
    values = torch.rand(520, 3, generator=generator(1))
    distance = torch.cdist(features.T, features.T)
    kernel = torch.exp(-distance.square() / 2)
    degree = kernel.sum(dim=1)
    exact = (kernel / (degree[:, None] * degree).sqrt()) @ values
    filtered = gaussian_filter(normalize(build_lattice(features)), values)
    assert float((filtered - exact).abs().max()) < 0.03
    # Far better than no filter, or one of another width.
    assert float((values - exact).abs().max()) > 0.4


def test_normalized_filter_keeps_constants_and_is_symmetric() -> None:
    features = torch.cat([grid(9, 11, 5.0), torch.randn(3, 99, generator=generator(2))])
    lattice = build_lattice(features)
    normal = normalize(lattice)
    eye = torch.eye(99)
    matrix, plain = gaussian_filter(normal, eye), gaussian_filter(lattice, eye)
    rows = plain.sum(dim=1)
    torch.testing.assert_close(matrix, plain / (rows[:, None] * rows[None]).sqrt(), atol=1e-6, rtol=1e-4)
