"""How objects and scenes of the mini data set look: polygons, textures and light. `dataset.py` arranges them.

An object is a list of polygons in its own coordinates (x to the right, y down, the object about 2 units wide, looking
to the right). Every class is ``body + part``: both classes of a family call the *same* body function with the same
palette and texture, and only the part function differs. That is the whole trick of the data set, so it is a table
here: `CLASSES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

FloatArray = NDArray[np.floating]
Points = NDArray[np.float64]  # (N, 2) as x, y
Colour = tuple[int, int, int]
Rng = np.random.Generator

SUPERSAMPLING = 3  # polygons are drawn this much larger, then averaged: thin legs stay visible at small extents


class Paint(IntEnum):
    """What a polygon is painted with; the colours behind the names are drawn per object."""

    BODY = 0
    BODY_SHADE = 1
    PART = 2
    PART_SHADE = 3
    DARK = 4
    LIGHT = 5
    GLASS = 6


@dataclass(frozen=True)
class Layer:
    """One polygon of an object; later layers cover earlier ones.

    Attributes:
        points: (N, 2) corners, x and y in object units.
        paint: what it is painted with.
        is_part: whether it belongs to the part that tells the classes of a family apart.
    """

    points: Points
    paint: Paint
    is_part: bool = False


@dataclass(frozen=True)
class Sprite:
    """A rendered object in a box of its own, to be put anywhere into a scene.

    Attributes:
        colour: (h, w, 3) float32 in [0, 255], already multiplied by ``alpha``.
        alpha: (h, w) float32 in [0, 1], the share of the pixel that the object covers.
        shape: (h, w) bool, the pixels that are at least half covered; none in the outermost rows and columns.
        part: (h, w) bool, the pixels of ``shape`` that show the part.
        ring: (h, w) bool, the pixels outside ``shape`` that touch it, corners included.
    """

    colour: NDArray[np.float32]
    alpha: NDArray[np.float32]
    shape: NDArray[np.bool_]
    part: NDArray[np.bool_]
    ring: NDArray[np.bool_]


# --- polygons -----------------------------------------------------------------------------------------------------


def _points(*corners: tuple[float, float]) -> Points:
    return np.array(corners, dtype=np.float64)


def _box(left: float, top: float, right: float, bottom: float) -> Points:
    return _points((left, top), (right, top), (right, bottom), (left, bottom))


def _ellipse(x: float, y: float, rx: float, ry: float, tilt: float = 0.0, lumps: int = 0, depth: float = 0.0) -> Points:
    """Ellipse around (x, y), tilted by ``tilt`` radians; ``lumps`` waves, ``depth`` high, make it woolly."""
    angle = np.linspace(0, 2 * np.pi, max(36, 8 * lumps), endpoint=False)
    radius = 1 + depth * np.cos(lumps * angle)
    px, py = rx * radius * np.cos(angle), ry * radius * np.sin(angle)
    return np.stack([x + px * np.cos(tilt) - py * np.sin(tilt), y + px * np.sin(tilt) + py * np.cos(tilt)], axis=1)


def _stroke(path: Points, start: float, end: float) -> Points:
    """Tube along ``path`` whose width goes from ``start`` to ``end``."""
    direction = np.gradient(path, axis=0)
    normal = np.stack([-direction[:, 1], direction[:, 0]], axis=1)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-9
    half = np.linspace(start, end, len(path))[:, None] / 2
    return np.concatenate([path + normal * half, (path - normal * half)[::-1]])


def _curve(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float], steps: int = 14) -> Points:
    """Quadratic Bezier curve from ``a`` to ``c``, pulled towards ``b``."""
    t = np.linspace(0, 1, steps)[:, None]
    return (1 - t) ** 2 * np.array(a) + 2 * t * (1 - t) * np.array(b) + t**2 * np.array(c)


def _leaf(x: float, y: float, angle: float, length: float, width: float) -> Points:
    """Pointed leaf from (x, y) towards ``angle`` (0 = up, clockwise, radians)."""
    t = np.linspace(0, 1, 12)
    half = width / 2 * np.sin(np.pi * t**0.8)
    along = np.concatenate([t * length, t[::-1] * length])
    across = np.concatenate([half, -half[::-1]])
    return np.stack(
        [x + along * np.sin(angle) + across * np.cos(angle), y - along * np.cos(angle) + across * np.sin(angle)], axis=1
    )


# --- families: one body each ----------------------------------------------------------------------------------------


def _animal_body(rng: Rng) -> list[Layer]:
    length, height = rng.uniform(0.52, 0.62), rng.uniform(0.28, 0.34)
    leg = rng.uniform(0.36, 0.48)
    stride = rng.uniform(-0.1, 0.1)
    layers = []
    for x, swing, paint in (
        (-0.62, -stride, Paint.BODY_SHADE),
        (0.50, -stride, Paint.BODY_SHADE),
        (-0.80, stride, Paint.BODY),
        (0.72, stride, Paint.BODY),
    ):
        hip, hoof = (x * length, 0.1), (x * length + swing, height + leg)
        ankle = (hoof[0], hoof[1] - 0.09)
        layers += [
            Layer(_stroke(_points(hip, ankle), 0.2, 0.13), paint),
            Layer(_stroke(_points(ankle, hoof), 0.14, 0.17), Paint.DARK),
        ]
    tail = _ellipse(-length - 0.05, -0.1, 0.13, 0.09, rng.uniform(-1.2, -0.5), 6, 0.08)
    torso = _ellipse(0, 0, length, height, 0, 15, 0.035)
    return [*layers, Layer(tail, Paint.BODY_SHADE), Layer(torso, Paint.BODY)]


def _vehicle_body(rng: Rng) -> list[Layer]:
    bed_top = rng.uniform(-0.30, -0.2)
    roof = rng.uniform(-0.66, -0.56)
    wheel = rng.uniform(0.18, 0.22)
    cab = _points((0.34, 0.3), (0.34, roof), (0.68, roof), (0.9, -0.14), (0.97, -0.06), (0.97, 0.3))
    window = _points((0.44, roof + 0.09), (0.65, roof + 0.09), (0.81, -0.14), (0.44, -0.14))
    layers = [
        Layer(_box(-0.95, 0.1, 0.97, 0.34), Paint.BODY_SHADE),
        Layer(_box(-0.97, bed_top, 0.38, 0.22), Paint.BODY),
        Layer(cab, Paint.BODY),
        Layer(window, Paint.GLASS),
        Layer(_ellipse(0.91, 0.12, 0.06, 0.06), Paint.LIGHT),
    ]
    for x in (-0.68, -0.22, 0.62):
        layers += [
            Layer(_ellipse(x, 0.36, wheel, wheel), Paint.DARK),
            Layer(_ellipse(x, 0.36, wheel * 0.45, wheel * 0.45), Paint.LIGHT),
        ]
    return layers


def _vase_body(rng: Rng) -> list[Layer]:
    belly, waist = rng.uniform(0.46, 0.56), rng.uniform(0.17, 0.22)
    belly_y = rng.uniform(-0.1, 0.15)
    y = np.linspace(-0.5, 0.8, 28)
    knots_y, knots_x = (
        [-0.5, -0.36, belly_y, 0.5, 0.68, 0.8],
        [waist + 0.03, waist, belly, 0.6 * belly, waist + 0.03, waist + 0.12],
    )
    half = ndimage.gaussian_filter1d(np.interp(y, knots_y, knots_x), 1.2, mode="nearest")
    outline = np.concatenate([np.stack([half, y], axis=1), np.stack([-half, y], axis=1)[::-1]])
    lip = _box(-waist - 0.08, -0.58, waist + 0.08, -0.48)
    return [Layer(outline, Paint.BODY), Layer(lip, Paint.BODY_SHADE)]


# --- classes: what sits on the body ---------------------------------------------------------------------------------


def _part(*layers: tuple[Points, Paint]) -> list[Layer]:
    return [Layer(points, paint, is_part=True) for points, paint in layers]


def _llama_head(rng: Rng) -> list[Layer]:
    x, y = rng.uniform(0.56, 0.7), rng.uniform(-0.92, -0.8)
    return _part(
        (_stroke(_curve((0.34, 0.02), (0.6, -0.2), (x, y)), 0.32, 0.17), Paint.PART),
        (_leaf(x - 0.06, y - 0.02, -0.22, 0.36, 0.12), Paint.PART_SHADE),
        (_leaf(x + 0.05, y - 0.02, 0.16, 0.36, 0.12), Paint.PART),
        (_ellipse(x + 0.09, y, 0.2, 0.125, 0.15), Paint.PART),
        (_ellipse(x + 0.22, y + 0.03, 0.09, 0.075, 0.2), Paint.LIGHT),
        (_ellipse(x + 0.08, y - 0.04, 0.03, 0.03), Paint.DARK),
    )


def _ram_head(rng: Rng) -> list[Layer]:
    x, y = rng.uniform(0.6, 0.68), rng.uniform(-0.36, -0.28)
    turn = np.linspace(-0.35 * np.pi, -2.15 * np.pi, 34)  # out of the brow, back, down and round to the front
    radius = np.linspace(0.29, 0.12, 34)
    spiral = np.stack([x - 0.1 + radius * np.cos(turn), y - 0.02 + radius * np.sin(turn)], axis=1)
    return _part(
        (_ellipse(x + 0.12, y + 0.08, 0.27, 0.16, 0.75), Paint.PART_SHADE),
        (_ellipse(x + 0.26, y + 0.21, 0.1, 0.09, 0.75), Paint.LIGHT),
        (_ellipse(x + 0.19, y + 0.05, 0.035, 0.035), Paint.DARK),
        (_stroke(spiral, 0.19, 0.07), Paint.PART),
    )


def _crane_boom(rng: Rng) -> list[Layer]:
    foot, tip = np.array((-0.52, -0.38)), np.array((rng.uniform(0.55, 0.8), rng.uniform(-1.2, -1.0)))
    along = (tip - foot) / np.linalg.norm(tip - foot)
    hook_y = tip[1] + rng.uniform(0.26, 0.36)
    bars = [
        (_stroke(np.stack([foot + along * d, foot + along * (d + 0.09)]), 0.18, 0.18), Paint.PART_SHADE)
        for d in np.arange(0.25, float(np.linalg.norm(tip - foot)) - 0.05, 0.22)
    ]
    hook = np.linspace(-0.5 * np.pi, 0.9 * np.pi, 14)
    return _part(
        (_stroke(_points(tuple(tip), (tip[0], hook_y)), 0.05, 0.05), Paint.DARK),
        (np.stack([tip[0] + 0.08 * np.cos(hook), hook_y + 0.08 + 0.08 * np.sin(hook)], axis=1), Paint.PART),
        (_box(-0.74, -0.56, -0.3, -0.2), Paint.PART_SHADE),
        (_stroke(np.stack([foot, tip]), 0.21, 0.17), Paint.PART),
        *bars,
        (_ellipse(float(foot[0]), float(foot[1]), 0.08, 0.08), Paint.DARK),
    )


def _mixer_drum(rng: Rng) -> list[Layer]:
    tilt = rng.uniform(0.12, 0.3)  # the open end, at the back, is the higher one
    x, y = -0.3, rng.uniform(-0.46, -0.4)
    turned = np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])
    drum = _points((-0.62, -0.13), (-0.3, -0.27), (0.12, -0.29), (0.46, -0.17), (0.5, 0), (0.46, 0.17), (0.12, 0.29))
    drum = np.concatenate([drum, _points((-0.3, 0.27), (-0.62, 0.13))])
    bands = [_points((s, -0.27), (s + 0.12, -0.28), (s + 0.22, 0.28), (s + 0.1, 0.27)) for s in (-0.42, -0.14, 0.12)]
    mouth = _ellipse(-0.62, 0, 0.06, 0.16)
    place = np.array((x, y))
    return _part(
        (drum @ turned + place, Paint.PART),
        *((band @ turned + place, Paint.PART_SHADE) for band in bands),
        (mouth @ turned + place, Paint.DARK),
    )


def _amphora_handles(rng: Rng) -> list[Layer]:
    reach, top = rng.uniform(0.62, 0.76), rng.uniform(-0.66, -0.54)
    layers = []
    for side in (-1, 1):
        upper = _curve((side * 0.14, -0.42), (side * reach, top - 0.3), (side * reach * 0.93, -0.25))
        lower = _curve((side * reach * 0.93, -0.25), (side * reach * 0.9, 0.0), (side * 0.38, 0.06))
        layers.append((_stroke(np.concatenate([upper, lower[1:]]), 0.13, 0.13), Paint.PART))
        layers.append((_ellipse(side * reach * 0.93, -0.26, 0.1, 0.1), Paint.PART_SHADE))
    return _part(*layers)


def _plant_crown(rng: Rng) -> list[Layer]:
    angles = np.linspace(-1.45, 1.45, 7) + rng.uniform(-0.1, 0.1, 7)
    order = np.argsort(-np.abs(angles))  # the upright leaves are in front
    layers = []
    for rank, angle in enumerate(angles[order]):
        length = rng.uniform(0.5, 0.62)
        layers.append((_leaf(0, -0.5, angle, length, 0.2), Paint.PART_SHADE if rank % 2 else Paint.PART))
        layers.append((_stroke(_leaf(0, -0.5, angle, length * 0.8, 0.0)[:12], 0.035, 0.01), Paint.PART_SHADE))
    return _part(*layers)


# --- distractors ----------------------------------------------------------------------------------------------------


def _boulder(rng: Rng) -> list[Layer]:
    angle = np.sort(rng.uniform(0, 2 * np.pi, 11))
    radius = rng.uniform(0.75, 1.0, 11)
    points = np.stack([radius * np.cos(angle), 0.7 * np.minimum(radius * np.sin(angle), 0.55)], axis=1)
    return [Layer(points, Paint.BODY_SHADE), Layer(points * (0.8, 0.7) - (0.04, 0.14), Paint.BODY)]


def _bush(rng: Rng) -> list[Layer]:
    layers = []
    for _ in range(9):
        x, y, r = rng.uniform(-0.6, 0.6), rng.uniform(-0.35, 0.35), rng.uniform(0.25, 0.4)
        layers.append(Layer(_ellipse(x, y, r, r * 0.9, 0, 9, 0.12), Paint(int(rng.integers(0, 2)))))
    return layers


def _post(rng: Rng) -> list[Layer]:
    """A signpost with two arms."""
    layers = [Layer(_box(-0.08, -1.0, 0.08, 1.0), Paint.BODY_SHADE)]
    for y, side in ((-0.78, 1), (-0.36, -1)):
        end = side * rng.uniform(0.45, 0.6)
        arm = _points((-0.3 * side, y - 0.15), (end, y - 0.15), (end + 0.18 * side, y), (end, y + 0.15))
        layers.append(Layer(np.concatenate([arm, _points((-0.3 * side, y + 0.15))]), Paint.BODY))
    return layers


def _ball(rng: Rng) -> list[Layer]:
    turn = rng.uniform(0, 2 * np.pi)
    layers = [Layer(_ellipse(0, 0, 1, 1), Paint.LIGHT)]
    for k, paint in enumerate((Paint.PART, Paint.PART_SHADE, Paint.PART)):
        angle = turn + k * 2 * np.pi / 3 + np.linspace(0, np.pi / 3, 9)
        wedge = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        layers.append(Layer(np.concatenate([_points((0, 0)), wedge]), paint))
    return layers


# --- tables ---------------------------------------------------------------------------------------------------------

# Part colours. Each class takes three, shares one of them with its sibling, and each colour occurs in two families or
# more: a colour narrows the choice down, as in life, and decides nothing.
TRIM: dict[str, Colour] = {
    "gold": (242, 192, 52),
    "orange": (238, 126, 44),
    "crimson": (206, 48, 58),
    "magenta": (208, 78, 160),
    "violet": (132, 86, 196),
    "blue": (52, 112, 210),
    "green": (92, 172, 62),
}
_COATS: tuple[Colour, ...] = ((236, 224, 204), (196, 168, 132), (142, 106, 78), (98, 84, 80), (172, 170, 168))
_PAINTS: tuple[Colour, ...] = ((228, 226, 218), (168, 182, 192), (176, 186, 150), (198, 164, 140), (112, 122, 140))
_GLAZES: tuple[Colour, ...] = ((204, 140, 104), (226, 214, 190), (168, 190, 180), (158, 110, 90), (126, 136, 156))


def _patches(u: FloatArray, v: FloatArray, rng: Rng) -> FloatArray:
    """Blotches of a coat, (h, w) in [0, 1]."""
    fu, fv, pu, pv = rng.uniform(4, 7), rng.uniform(4, 7), rng.uniform(0, 6), rng.uniform(0, 6)
    waves = np.sin(fu * u + pu + 1.5 * np.sin(3 * v)) + np.sin(fv * v + pv + 1.5 * np.sin(4 * u))
    return np.clip((waves - 0.3) * 2.5, 0, 1)


def _panels(u: FloatArray, v: FloatArray, rng: Rng) -> FloatArray:
    """A painted stripe and the ribs of the loading bed, (h, w) in [0, 1]."""
    stripe = np.abs(v - rng.uniform(-0.05, 0.05)) < rng.uniform(0.05, 0.09)
    ribs = 0.45 * (np.mod(u * rng.uniform(3.2, 4.2), 1) < 0.22)
    return np.maximum(stripe, ribs)


def _bands(u: FloatArray, v: FloatArray, rng: Rng) -> FloatArray:
    """Bands and a zigzag, as on a Greek vase, (h, w) in [0, 1]."""
    zigzag = np.abs(np.mod(u * rng.uniform(3, 4.5), 1) - 0.5) * 0.24
    centre = rng.uniform(0.0, 0.14)
    lines = (np.abs(v - centre + 0.22) < 0.035) | (np.abs(v - centre - 0.22) < 0.035)
    return np.maximum(lines, np.abs(v - centre - zigzag + 0.06) < 0.06).astype(float)


def _plain(u: FloatArray, v: FloatArray, rng: Rng) -> FloatArray:
    """Faint speckles, (h, w) in [0, 1]."""
    return 0.3 * rng.random(u.shape)


@dataclass(frozen=True)
class Look:
    """How a kind of thing is drawn.

    Attributes:
        body: draws the layers it shares with its family.
        part: draws what tells it apart, or None.
        colours: of the body.
        texture: (u, v, rng) -> (h, w) weight of the second body colour.
        trim: the part's colours, keys of `TRIM`.
        scene: the scene the class prefers; empty for distractors.
    """

    body: Callable[[Rng], list[Layer]]
    part: Callable[[Rng], list[Layer]] | None
    colours: tuple[Colour, ...]
    texture: Callable[[FloatArray, FloatArray, Rng], FloatArray]
    trim: tuple[str, ...] = tuple(TRIM)
    scene: str = ""


CLASSES: dict[str, Look] = {
    "llama": Look(_animal_body, _llama_head, _COATS, _patches, ("crimson", "magenta", "violet"), "dunes"),
    "ram": Look(_animal_body, _ram_head, _COATS, _patches, ("gold", "orange", "crimson"), "meadow"),
    "crane": Look(_vehicle_body, _crane_boom, _PAINTS, _panels, ("green", "orange", "crimson"), "street"),
    "mixer": Look(_vehicle_body, _mixer_drum, _PAINTS, _panels, ("crimson", "magenta", "blue"), "snow"),
    "amphora": Look(_vase_body, _amphora_handles, _GLAZES, _bands, ("violet", "blue", "gold"), "dunes"),
    "plant": Look(_vase_body, _plant_crown, _GLAZES, _bands, ("green", "gold", "orange"), "street"),
}
DISTRACTORS: dict[str, Look] = {
    "boulder": Look(_boulder, None, ((132, 128, 122), (156, 146, 134), (104, 102, 108)), _plain),
    "bush": Look(_bush, None, ((74, 112, 56), (104, 128, 66), (58, 92, 70)), _plain),
    "post": Look(_post, None, ((150, 116, 82), (184, 160, 126), (112, 108, 108)), _plain),
    "ball": Look(_ball, None, ((230, 226, 220),), _plain),  # the one in the colours of parts
}


# --- rendering a thing ----------------------------------------------------------------------------------------------


def _jitter(colour: Colour, rng: Rng, amount: float = 12.0) -> FloatArray:
    return np.clip(np.array(colour) + rng.normal(0, amount, 3), 12, 250)


def _palette(look: Look, rng: Rng) -> tuple[FloatArray, FloatArray]:
    """The (7, 3) colour of each `Paint` and the (3,) second body colour of the texture, in [0, 255]."""
    body = _jitter(look.colours[rng.integers(len(look.colours))], rng)
    part = _jitter(TRIM[look.trim[rng.integers(len(look.trim))]], rng)
    dark, light = _jitter((44, 40, 44), rng, 5), _jitter((240, 234, 216), rng, 5)
    glass = _jitter((150, 196, 216), rng, 8)
    # A light body gets a darker pattern and the other way round, so that the pattern always shows.
    second = body * 0.62 if body.mean() > 120 else body + 0.5 * (255 - body)
    return np.stack([body, body * 0.78, part, part * 0.68, dark, light, glass]), second


def _emboss(alpha: FloatArray, extent: float, light: tuple[float, float]) -> NDArray[np.float32]:
    """Shading of a silhouette as if it were puffed up, (h, w) in [0.62, 1.3]: bright towards the light."""
    sigma = max(0.05 * extent, 0.6)
    dy, dx = np.gradient(ndimage.gaussian_filter(alpha, sigma, truncate=2.5, mode="constant"))
    return np.clip(1 - 0.75 * sigma * (dx * light[0] + dy * light[1]), 0.62, 1.3).astype(np.float32)


def _pose(layers: list[Layer], extent: float, rng: Rng) -> tuple[Points, Points, tuple[int, int]]:
    """Rotate, mirror and stretch an object at random: matrix and shift to pixels, and the box with a free margin."""
    angle, mirror = np.deg2rad(np.clip(rng.normal(0, 9), -25, 25)), rng.choice([-1.0, 1.0])
    squeeze = rng.uniform(0.88, 1.12)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    matrix = np.diag([mirror * squeeze, 1 / squeeze]) @ turn
    corners = np.concatenate([layer.points for layer in layers]) @ matrix
    low, high = corners.min(axis=0), corners.max(axis=0)
    scale = extent / (high - low).max()
    width, height = np.ceil((high - low) * scale).astype(int) + 2
    return matrix * scale, 1 - low * scale, (int(height), int(width))


def _draw_index(layers: list[Layer], matrix: Points, shift: Points, box: tuple[int, int]) -> Image.Image:
    """Draw the number of the topmost layer, counted from 1, at `SUPERSAMPLING` times the size of the box."""
    height, width = box
    index = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING), 0)
    pen = ImageDraw.Draw(index)
    for number, layer in enumerate(layers, start=1):
        pixels = (layer.points @ matrix + shift) * SUPERSAMPLING
        pen.polygon(pixels.ravel().tolist(), fill=number)
    return index


def _averages(index: Image.Image, values: FloatArray) -> NDArray[np.float32]:
    """Replace each layer's number by its value in [0, 255], outside by 0, and average: (h, w) in [0, 255]."""
    table = np.zeros(256, np.uint8)
    table[1 : len(values) + 1] = values
    return np.asarray(index.point(table.tolist()).reduce(SUPERSAMPLING), dtype=np.float32)


def _shares(index: Image.Image, layers: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Share of each pixel that the chosen layers cover, (h, w) in [0, 1]."""
    return _averages(index, np.where(layers, 255.0, 0.0)) / np.float32(255)


def render_object(look: Look, extent: float, rng: Rng, light: tuple[float, float]) -> Sprite:
    """Draw one object at random: shape, pose, colours and texture.

    Args:
        look: what to draw.
        extent: longer side of the object's bounding box, in pixels.
        rng: source of all randomness.
        light: x, y of the direction the light comes from, about unit length.

    Returns:
        The object in a box that is one pixel wider than it on each side.
    """
    layers = look.body(rng) + (look.part(rng) if look.part else [])
    matrix, shift, box = _pose(layers, extent, rng)
    index = _draw_index(layers, matrix, shift, box)
    paints = np.array([layer.paint for layer in layers])
    colours, second = _palette(look, rng)

    colour = np.stack([_averages(index, colours[paints, channel]) for channel in range(3)], axis=2)
    alpha = _shares(index, np.ones(len(layers), dtype=bool))
    textured = _shares(index, paints <= Paint.BODY_SHADE)
    part = _shares(index, np.array([layer.is_part for layer in layers]))

    # The texture is fixed to the object: it turns and shrinks along with it.
    rows, columns = np.mgrid[: box[0], : box[1]]
    local = (np.stack([columns, rows], axis=2) + 0.5 - shift) @ np.linalg.inv(matrix)  # (h, w, 2), object units
    weight = textured * look.texture(local[..., 0], local[..., 1], rng)
    colour += (weight[..., None] * (second - colours[Paint.BODY])).astype(np.float32)
    colour *= _emboss(alpha, extent, light)[..., None]

    shape = alpha >= 0.5
    return Sprite(
        colour=np.clip(colour, 0, 255, dtype=np.float32),
        alpha=alpha,
        shape=shape,
        part=shape & (part >= 0.5 * alpha),
        ring=ndimage.binary_dilation(shape, np.ones((3, 3), dtype=bool)) & ~shape,
    )


# --- scenes ---------------------------------------------------------------------------------------------------------


def smooth_noise(rng: Rng, size: int, across: int, down: int) -> NDArray[np.float32]:
    """Random field of ``across`` by ``down`` bumps, (size, size), mean about 0, standard deviation below 1."""
    grid = Image.fromarray(rng.normal(0, 1, (down + 2, across + 2)).astype(np.float32))
    return np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))


def _grass(rng: Rng, x: FloatArray, y: FloatArray, depth: FloatArray) -> FloatArray:
    size = len(x)
    blades = smooth_noise(rng, size, size // 2, size // 7)
    return 0.13 * blades + 0.10 * smooth_noise(rng, size, 6, 9)


def _ripples(rng: Rng, x: FloatArray, y: FloatArray, depth: FloatArray) -> FloatArray:
    size = len(x)
    bend = smooth_noise(rng, size, 4, 4)
    return 0.09 * np.sin(rng.uniform(9, 13) * np.log(depth + 0.12) * 2 + 2.2 * bend) + 0.05 * smooth_noise(
        rng, size, 40, 40
    )


def _drifts(rng: Rng, x: FloatArray, y: FloatArray, depth: FloatArray) -> FloatArray:
    size = len(x)
    drifts = np.minimum(smooth_noise(rng, size, 4, 10), 0.4)
    return 0.13 * drifts + 0.035 * smooth_noise(rng, size, 50, 50)


def _tile_tones(rng: Rng, row: FloatArray, column: FloatArray) -> FloatArray:
    """A brightness in [-0.5, 0.5] per tile; a pixel's tile is the integer part of its ``row`` and ``column``."""
    tones = rng.random((64, 64)) - 0.5
    return tones[np.floor(row).astype(int) % 64, np.floor(column).astype(int) % 64]


def _cobbles(rng: Rng, x: FloatArray, y: FloatArray, depth: FloatArray) -> FloatArray:
    row = 7 * np.log(depth + 0.2) * 1.6
    column = (x - 0.5) / (depth + 0.45) * 9 + 0.5 * (np.floor(row) % 2)
    joint = (np.mod(row, 1) < 0.2) | (np.mod(column, 1) < 0.16)
    return 0.18 * _tile_tones(rng, row, column) - 0.2 * joint + 0.05 * smooth_noise(rng, len(x), 40, 40)


def _hills(rng: Rng, x: FloatArray) -> FloatArray:
    return 0.07 + 0.05 * np.sin(rng.uniform(3, 6) * x + rng.uniform(0, 6)) + 0.02 * np.sin(13 * x + rng.uniform(0, 6))


def _dune_line(rng: Rng, x: FloatArray) -> FloatArray:
    peak = rng.uniform(1.5, 2.6)
    return 0.02 + 0.13 * np.abs(np.mod(peak * x + rng.random(), 1) - 0.35)


def _pines(rng: Rng, x: FloatArray) -> FloatArray:
    number = rng.uniform(9, 14)
    heights = rng.uniform(0.35, 1, 16)
    tree = np.mod(number * x, 1)
    return 0.03 + 0.15 * heights[(number * x).astype(int)] * (1 - 2 * np.abs(tree - 0.5))


def _wall(rng: Rng, x: FloatArray) -> FloatArray:
    return np.full_like(x, 0.6)


@dataclass(frozen=True)
class Scenery:
    """How a scene is drawn.

    Attributes:
        sky: colours at the top and at the horizon.
        back: colour of the skyline.
        ground: colours at the horizon and at the lower border.
        skyline: (rng, x in [0, 1]) -> height above the horizon, as a fraction of the image.
        texture: (rng, x, y, depth) -> (size, size) relative brightness; depth is 0 at the horizon, 1 at the border.
        bricks: whether the back is a brick wall.
    """

    sky: tuple[Colour, Colour]
    back: Colour
    ground: tuple[Colour, Colour]
    skyline: Callable[[Rng, FloatArray], FloatArray]
    texture: Callable[[Rng, FloatArray, FloatArray, FloatArray], FloatArray]
    bricks: bool = False


SCENES: dict[str, Scenery] = {
    "meadow": Scenery(
        ((108, 164, 222), (206, 226, 236)), (96, 140, 104), ((142, 172, 88), (82, 132, 52)), _hills, _grass
    ),
    "dunes": Scenery(
        ((122, 158, 206), (246, 214, 176)), (206, 160, 112), ((226, 188, 134), (210, 160, 98)), _dune_line, _ripples
    ),
    "snow": Scenery(
        ((146, 172, 208), (222, 226, 236)), (62, 92, 96), ((224, 230, 240), (206, 218, 236)), _pines, _drifts
    ),
    "street": Scenery(
        ((168, 178, 190), (168, 178, 190)), (158, 96, 78), ((146, 142, 140), (118, 114, 116)), _wall, _cobbles, True
    ),
}


def _brick_wall(rng: Rng, x: FloatArray, y: FloatArray) -> FloatArray:
    """Relative brightness of a brick wall, (size, size)."""
    row = y * 22
    column = x * 9 + 0.5 * (np.floor(row) % 2)
    joint = (np.mod(row, 1) < 0.22) | (np.mod(column, 1) < 0.1)
    return 0.22 * _tile_tones(rng, row, column) + 0.22 * joint


def paint_scene(name: str, size: int, rng: Rng) -> tuple[NDArray[np.float32], int]:
    """Paint an empty scene.

    Args:
        name: one of `SCENES`.
        size: side of the image, in pixels.
        rng: source of all randomness.

    Returns:
        (size, size, 3) colours in about [0, 255], and the row of the horizon.
    """
    scenery = SCENES[name]
    horizon = rng.uniform(0.26, 0.46)
    line = (np.arange(size) + 0.5) / size
    x, y = np.broadcast_to(line, (size, size)), np.broadcast_to(line[:, None], (size, size))
    depth = np.clip((y - horizon) / (1 - horizon), 0, 1)
    far, near = (_jitter(colour, rng, 7) for colour in scenery.ground)
    ground = far + depth[..., None] * (near - far)
    ground *= 1 + scenery.texture(rng, x, y, depth)[..., None]
    top, low = (_jitter(colour, rng, 7) for colour in scenery.sky)
    clouds = np.clip(smooth_noise(rng, size, 4, 8), 0, 1)[..., None] * 0.35
    sky = top + np.clip(y / horizon, 0, 1)[..., None] * (low - top)
    sky += clouds * (250 - sky)
    tone = _brick_wall(rng, x, y) if scenery.bricks else 0.06 * smooth_noise(rng, size, 16, 16)
    back = _jitter(scenery.back, rng, 9) * (1 + tone[..., None])
    behind = np.where((horizon - y < scenery.skyline(rng, line))[..., None], back, sky)
    image = np.where((y < horizon)[..., None], behind, ground)
    return image.astype(np.float32), int(horizon * size)
