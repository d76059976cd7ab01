"""The permutohedral lattice: a Gaussian filter over scattered points, in time linear in their number.

In a dense CRF every pixel gets the sum over all other pixels, weighted by a Gaussian of their distance in a feature
space (position, or position and colour): N² pairs. The lattice approximates the sums in three steps: *splat* each point
onto the corners of the lattice cell around it, *blur* along each axis, and *slice*: read the result at the points, with
the weights of the splat. It runs on any device of torch.

Source: Adams, Baek and Davis, "Fast high-dimensional filtering using the permutohedral lattice", Eurographics 2010. The
scaling of the axes, the missing neighbours and the rounding follow the implementation of Kraehenbuehl and Koltun,
"Efficient inference in fully connected CRFs", NIPS 2011, which pydensecrf wraps, so that both give the same result.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

MOST_PER_BAG = 64
"""Points that one GPU thread sums. A few vertices gather thousands (a white sky), and the other threads would wait."""

POINTS_AT_ONCE = 4
"""The original embeds points in fours and pads the last four with points whose features are 0. Their vertices are empty
but pass values on between their neighbours; without them dark images get other masks."""

SMALLEST_NORM = 1e-20  # keeps the normalisation finite


@dataclass(frozen=True)
class Lattice:
    """The M vertices that N points with d features touch. Vertex M is every neighbour that no point touches: always 0.

    Attributes:
        vertices: int32 (N, d+1), the corners of the cell around each point.
        slice_weights: float32 (N, d+1), each corner's share in the point.
        points: int32 (E,), the points by the vertex that they touch; ``E = (d+1) * N``, N padded
            (:data:`POINTS_AT_ONCE`).
        splat_weights: float32 (E,), the share of each of ``points`` in its vertex; 0 for padding.
        bags: the stretches of ``points`` to sum, see :func:`vertex_bags`.
        neighbors: int32 (d+1, M+1, 2), the two next vertices along each axis.
    """

    vertices: Tensor
    slice_weights: Tensor
    points: Tensor
    splat_weights: Tensor
    bags: tuple[Tensor, ...]
    neighbors: Tensor


def build_lattice(features: Tensor) -> Lattice:
    """Prepare the filter for points, float32 (d, N), each feature divided by its kernel's standard deviation."""
    num_features, num_points = features.shape
    if num_points % POINTS_AT_ONCE:
        features = torch.cat([features, features.new_zeros(num_features, 1)], dim=1)
    corner, rank, weights = embed(features)
    weights[:, num_points:] = 0  # padding touches vertices, but has no value
    keys, steps = vertex_keys(corner, rank)
    # A vertex's entries have the same remainder, so they are in one row, ordered by point as in the original's sum.
    table, vertices, order, starts = number_vertices(keys)
    # Blurring with (1/2, 1, 1/2) along d+1 axes makes everything 1 + 2^-d times too large.
    lost = 1 / (1 + 2.0**-num_features)
    return Lattice(
        vertices=vertices.T[:num_points].contiguous(),
        slice_weights=weights.T[:num_points].contiguous() * lost,
        points=(order % features.shape[1]).clamp(max=num_points - 1).int(),
        splat_weights=weights.reshape(-1).index_select(0, order),
        bags=vertex_bags(starts, None if features.device.type == "cpu" else MOST_PER_BAG),
        neighbors=find_neighbors(table, steps),
    )


def gaussian_filter(lattice: Lattice, values: Tensor) -> Tensor:
    """Replace each point's values, float32 (N, C), by the Gaussian-weighted sum of all points' values."""
    of_vertices = functional.embedding_bag(
        lattice.points,
        values,
        lattice.bags[0],
        mode="sum",
        per_sample_weights=lattice.splat_weights,
        include_last_offset=True,
    )
    for parts in lattice.bags[1:]:  # bags that were split
        each = torch.arange(len(of_vertices), dtype=torch.int32, device=values.device)
        of_vertices = functional.embedding_bag(each, of_vertices, parts, mode="sum", include_last_offset=True)
    for pair in lattice.neighbors:
        both = functional.embedding_bag(pair, of_vertices, mode="sum")
        of_vertices = torch.add(of_vertices, both, alpha=0.5)
    return functional.embedding_bag(lattice.vertices, of_vertices, mode="sum", per_sample_weights=lattice.slice_weights)


def normalize(lattice: Lattice) -> Lattice:
    """Make the filter symmetric with weights that sum to about 1: D^(-1/2) K D^(-1/2), where D holds K's row sums.

    Both square roots are multiplied into the lattice's weights, so that filtering costs no more.
    """
    ones = torch.ones(len(lattice.vertices), 1, device=lattice.vertices.device)
    factor = (gaussian_filter(lattice, ones) + SMALLEST_NORM).rsqrt()  # (N, 1)
    return replace(
        lattice,
        slice_weights=lattice.slice_weights * factor,
        splat_weights=lattice.splat_weights * factor[:, 0].index_select(0, lattice.points),
    )


def embed(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the lattice cell around each point: features, float32 (d, N).

    The lattice is in the plane of d+1 coordinates that sum to 0. The coordinates of a vertex are integers with the same
    remainder modulo d+1; a cell (a simplex) has one vertex of each remainder 0 to d.

    Returns:
        The cell's vertex of remainder 0, float32 (d+1, N) of integers; the rank of each coordinate's distance to it,
        int8 (d+1, N), 0 for the largest; and the barycentric weights of the cell's vertices by remainder, float32
        (d+1, N), not negative, summing to 1.

    Source: Adams et al. 2010, sections 3 and 4.
    """
    d, num_points = features.shape
    # The blur's variance is that of a kernel with standard deviation 1 when the axes are stretched like this.
    # Rounded to single precision where the original is: narrow kernels make coordinates so large that it shows.
    deviation = float(np.float32(math.sqrt(2 / 3) * (d + 1)))
    stretch = [1 / math.sqrt((i + 1) * (i + 2)) * deviation for i in range(d)]
    scaled = features * torch.tensor(stretch, device=features.device)[:, None]
    elevated = features.new_empty(d + 1, num_points)  # coordinates in the plane
    beyond = torch.zeros_like(scaled[0])  # the sum of the later features
    for j in range(d, 0, -1):
        elevated[j] = beyond - j * scaled[j - 1]
        beyond = beyond + scaled[j - 1]
    elevated[0] = beyond

    corner = (elevated * (1 / (d + 1))).round() * (d + 1)
    rest = elevated - corner
    rank = torch.arange(d + 1, dtype=torch.int8, device=features.device)[:, None].repeat(1, num_points)
    for i in range(d):
        for j in range(i + 1, d + 1):
            less = (rest[i] < rest[j]).view(torch.int8)
            rank[i] += less
            rank[j] -= less
    # Rounding each coordinate by itself can leave the plane; the sum of the ranks' overflow says by how much.
    rank += (corner.sum(dim=0) * (1 / (d + 1))).round().to(torch.int8)
    wrapped = (rank < 0).to(torch.int8) - (rank > d).to(torch.int8)
    rank += wrapped * (d + 1)
    corner += wrapped * (d + 1)

    by_rank = torch.empty_like(elevated).scatter_(0, rank.long(), (elevated - corner) * (1 / (d + 1)))
    weights = torch.empty_like(elevated)
    weights[1:] = (by_rank[:-1] - by_rank[1:]).flip(0)
    weights[0] = by_rank[d] + (1 - by_rank[0])
    return corner, rank, weights


def vertex_keys(corner: Tensor, rank: Tensor) -> tuple[Tensor, list[int]]:
    """Name every vertex by one integer, to which a step along an axis adds a constant.

    The key has one digit for each of the first d coordinates, from which the last one follows. Corners and ranks are
    those of :func:`embed`.

    Returns:
        int64 (d+1, N), the keys of each point's cell by remainder; and per axis what is added to a key for the next
        vertex along it. ValueError if the features differ by so many kernel widths that 64 bits are too few.
    """
    d = len(corner) - 1
    digits = corner[:d].long()
    digits -= digits.amin(dim=1, keepdim=True)
    # Room for the corners of the outermost cells and for their neighbours: each is at most d+1 away.
    room = (digits.amax(dim=1) + 4 * (d + 1) + 1).tolist()
    if math.prod(room) >= 2**62:
        raise ValueError(f"the kernels are too narrow for the lattice: features differ by {max(room)} steps")
    factors = [math.prod(room[:i]) for i in range(d)]
    # From one remainder to the next all coordinates grow by 1, but for one, which falls by d: the next by rank.
    falls = torch.tensor([(d + 1) * factor for factor in factors] + [0], device=corner.device)
    fall_of = torch.empty(rank.shape, dtype=torch.int64, device=corner.device)
    fall_of.scatter_(0, rank.long(), falls[:, None].expand(rank.shape))
    keys = torch.empty_like(fall_of)
    keys[0] = sum(digit * factor for digit, factor in zip(digits, factors, strict=True))
    for remainder in range(d):
        keys[remainder + 1] = keys[remainder] + (sum(factors) - fall_of[d - remainder])
    return keys, [sum(factors) - (d + 1) * factor for factor in [*factors, 0]]


def number_vertices(keys: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Number the vertices, and group the E entries of ``keys``, int64 (d+1, N), that touch the same one.

    Returns:
        The key of each number, int64 (M,) ascending; the number of each entry, int32 (d+1, N); the entries by number,
        then by place in ``keys``, int64 (E,); and where each number's entries begin among those, int32 (M+1,), E last.
    """
    ordered, order = keys.reshape(-1).sort(stable=True)
    first = torch.cat([torch.ones_like(ordered[:1], dtype=torch.bool), ordered[1:] != ordered[:-1]])
    starts = first.nonzero()[:, 0]
    numbers = torch.empty_like(ordered, dtype=torch.int32).scatter_(0, order, first.cumsum(0, dtype=torch.int32) - 1)
    return ordered[starts], numbers.view_as(keys), order, torch.cat([starts, starts.new_tensor([len(order)])]).int()


def find_neighbors(table: Tensor, steps: Sequence[int]) -> Tensor:
    """Link each vertex with the next ones along every axis: int32 (d+1, M+1, 2) in [0, M], where M means none.

    A neighbour that no point touches is missing, as in the original implementation. Creating it would be more exact
    and make the lattice an order of magnitude larger. ``table`` holds the keys, int64 (M,) ascending; ``steps`` are
    those of :func:`vertex_keys`.
    """
    missing = len(table)
    neighbors = torch.full((len(steps), missing + 1, 2), missing, dtype=torch.int32, device=table.device)
    numbers = torch.arange(missing, dtype=torch.int32, device=table.device)
    for axis, step in enumerate(steps):
        wanted = table + step
        place = torch.searchsorted(table, wanted).clamp(max=missing - 1)
        found = torch.where(table.index_select(0, place) == wanted, place, missing)
        neighbors[axis, :missing, 0] = found
        neighbors[axis, :, 1].scatter_(0, found, numbers)  # a vertex is the previous one of its next one
    neighbors[:, missing] = missing  # vertices without a next one have written there
    return neighbors


def vertex_bags(starts: Tensor, most: int | None) -> tuple[Tensor, ...]:
    """Offsets for ``embedding_bag`` with ``include_last_offset``; the last bag, of the missing neighbours, is empty.

    ``starts``, int32 (M+1,), holds the first point of each vertex, and the number of all points. With ``most`` points
    per bag there are two tensors: for the parts of vertices, and for the sum of each vertex's parts.
    """
    whole = torch.cat([starts, starts[-1:]])
    if most is None:
        return (whole,)
    counts = starts.diff()
    num_parts = (counts + most - 1) // most
    first_part = torch.cat([num_parts.new_zeros(1), num_parts.cumsum(0)]).int()
    vertex = torch.repeat_interleave(torch.arange(len(counts), device=starts.device), num_parts)
    part = torch.arange(len(vertex), device=starts.device) - first_part[vertex]
    parts = torch.cat([starts[vertex] + part * most, starts[-1:]]).int()
    return parts, torch.cat([first_part, first_part[-1:]])
