"""The permutohedral lattice: its geometry by hand, and its filter against written-out Gaussian sums."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import generator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smaflib.refinement.lattice import (
    build_lattice,
    embed,
    find_neighbors,
    gaussian_filter,
    normalize,
    number_vertices,
    vertex_keys,
)

points = st.tuples(st.integers(1, 5), st.integers(1, 40), st.sampled_from([0.3, 3.0, 60.0]), st.integers(0, 10**6))


def random_features(drawn: tuple[int, int, float, int]) -> Tensor:
    num_features, num_points, spread, seed = drawn
    return torch.randn(num_features, num_points, generator=generator(seed)) * spread


def grid(height: int, width: int, sxy: float) -> Tensor:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x.flatten(), y.flatten()]) / sxy


def test_one_feature_by_hand() -> None:
    # One feature is stretched by sqrt(2/3) * 2 / sqrt(2) = 1.1547, to coordinates (a, -a). The vertices of the line are
    # ..., (0, 0) with remainder 0, (1, -1) with remainder 1, ...: a = 0.5 lies half-way between these two.
    stretch = math.sqrt(4 / 3)
    corner, rank, weights = embed(torch.tensor([[0.0, 0.5, 0.8, -0.1, 1.9]]) / stretch)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.5, 0.2, 0.9, 0.9], [0.0, 0.5, 0.8, 0.1, 0.1]]))
    assert corner[0].tolist() == [0, 0, 0, 0, 2]  # remainder 0: even numbers
    # From remainder 0 to 1 the first coordinate grows, or falls where the point lies on the other side.
    assert rank.tolist() == [[0, 0, 0, 1, 1], [1, 1, 1, 0, 0]]


@settings(max_examples=60, deadline=None)
@given(drawn=points)
def test_a_point_is_the_weighted_mean_of_its_cell(drawn: tuple[int, int, float, int]) -> None:
    features = random_features(drawn)
    d = len(features)
    corner, rank, weights = embed(features)
    scale = max(1.0, float(features.abs().max()))
    assert float(weights.min()) >= -1e-5 * scale
    torch.testing.assert_close(weights.sum(dim=0), torch.ones(features.shape[1]))
    assert torch.equal(corner.remainder(d + 1), torch.zeros_like(corner))
    assert torch.equal(corner.sum(dim=0), torch.zeros(features.shape[1]))
    assert torch.equal(rank.sort(dim=0).values, torch.arange(d + 1, dtype=torch.int8)[:, None].expand(rank.shape))
    # The vertex of remainder k adds k to every coordinate, less d+1 where the rank is above d-k.
    vertices = torch.stack([corner + k - (d + 1) * (rank > d - k) for k in range(d + 1)])
    mean = (vertices * weights[:, None]).sum(dim=0)
    # The elevated point, written as in the paper: rows of the basis are orthogonal and sum to 0.
    basis = torch.zeros(d + 1, d, dtype=torch.float64)
    for i in range(d):
        basis[: i + 1, i] = 1
        basis[i + 1, i] = -(i + 1)
        basis[:, i] *= math.sqrt(2 / 3) * (d + 1) / math.sqrt((i + 1) * (i + 2))
    torch.testing.assert_close(mean.double(), basis @ features.double(), atol=1e-4 * scale, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(drawn=points)
def test_keys_tell_vertices_apart_and_steps_lead_to_neighbors(drawn: tuple[int, int, float, int]) -> None:
    features = random_features(drawn)
    d = len(features)
    corner, rank, _ = embed(features)
    keys, steps = vertex_keys(corner, rank)
    vertices = torch.stack([corner + k - (d + 1) * (rank > d - k) for k in range(d + 1)])  # (d+1, d+1, N)
    flat = vertices.permute(0, 2, 1).reshape(-1, d + 1).long()
    assert len(keys.flatten().unique()) == len(flat.unique(dim=0))
    by_coordinates = {tuple(vertex): int(key) for vertex, key in zip(flat.tolist(), keys.flatten(), strict=True)}
    table, numbers, order, starts = number_vertices(keys)
    assert torch.equal(table[numbers.long()], keys) and torch.equal(table, keys.unique())
    # Entries by number, then by place; each number's begin where the next lower number's end.
    assert torch.equal(order, numbers.flatten().argsort(stable=True))
    assert torch.equal(starts.diff(), numbers.flatten().bincount()) and int(starts[0]) == 0
    neighbors = find_neighbors(table, steps)
    coordinates = {key: vertex for vertex, key in by_coordinates.items()}
    for axis in range(d + 1):
        for index, key in enumerate(table.tolist()):
            for side, sign in ((0, 1), (1, -1)):
                wanted = tuple(c + sign * (1 if i != axis else -d) for i, c in enumerate(coordinates[key]))
                expected = by_coordinates.get(wanted)
                found = int(neighbors[axis, index, side])
                assert (found == len(table)) if expected is None else (int(table[found]) == expected)


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


def test_split_bags_give_the_same_filter() -> None:
    features, values = random_features((3, 40, 3.0, 0)), torch.rand(40, 4, generator=generator(3))
    whole, split = (gaussian_filter(build_lattice(features, most_per_bag=most), values) for most in (None, 2))
    torch.testing.assert_close(split, whole, atol=1e-6, rtol=1e-5)
