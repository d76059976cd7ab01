"""The mini data set: a weakly supervised segmentation task that is drawn by code in a minute.

Six classes in three families: llama and ram, crane and mixer, amphora and plant. The two classes of a family have the
*same* body - shape, texture and colours come from one distribution - and differ in one part only: neck and ears or
curled horns, a boom or a drum, handles or leaves. Only the part tells an image classifier which of the two an image
shows, so its class activation map covers the part and misses the body: the failure that self-training on attention
maps is meant to repair. Nothing in the data hides or exaggerates it:

- objects span 14 % to 95 % of the image side, so that no single scale suits all of them;
- one to three objects, rotated, mirrored, sometimes cut off by the border or half behind one another;
- each class prefers one of four scenes (p = .6), a misleading context, as roads are for cars in photographs;
- distractors without a class, one kind in the colours of the parts; a part shares its colours with its sibling and with
  other families, so that colour decides nothing;
- light gradient, colour cast, blur and noise.

Masks are drawn along with the images, for evaluation only. The saliency maps imitate a detector that was trained
elsewhere: they start from the ground truth, then lose objects, include distractors, and are warped and blurred (IoU
about .76 with the true foreground). A method that reads them gets this much pixel information; the plain mode reads
none.

`draw_scene` draws one scene; `make_mini` writes a data set in the layout of PASCAL VOC.
"""

import functools
import multiprocessing
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from minidata.drawing import (
    CLASSES,
    DISTRACTORS,
    SCENES,
    Look,
    Sprite,
    paint_scene,
    render_object,
    smooth_noise,
)
from smaflib.data.masks import VOC_PALETTE

FAMILIES: tuple[tuple[str, str], ...] = (("llama", "ram"), ("crane", "mixer"), ("amphora", "plant"))
CLASS_NAMES: tuple[str, ...] = tuple(name for family in FAMILIES for name in family)
PREFERRED_SCENES: dict[str, str] = {name: CLASSES[name].scene for name in CLASS_NAMES}
VOID = 255

_MIN_SIZE = 64  # below, most objects would be too small to be kept
_CONTEXT_BIAS = 0.6  # share of the images whose first object is in its preferred scene
_SHARE_OF_COUNTS = (0.6, 0.28, 0.12)  # images with 1, 2, 3 objects
_MIN_EXTENT = 12  # pixels; what shows less of itself is not drawn
_MIN_PIXELS = 40
_MIN_VISIBLE = 0.55  # of an object's pixels, and of its part's: a label nobody could tell would be label noise


@dataclass(frozen=True)
class SceneObject:
    """One labelled object as it appears in the mask.

    Attributes:
        class_name: its class.
        extent: longer side of the bounding box of its pixels in the mask.
        num_pixels: number of these pixels.
        num_part_pixels: those of them that show the part which tells the class from its sibling.
    """

    class_name: str
    extent: int
    num_pixels: int
    num_part_pixels: int


@dataclass(frozen=True)
class Scene:
    """One image and all that is known about it.

    Attributes:
        image: (size, size, 3) uint8, RGB.
        mask: (size, size) uint8, 0 = background, 1 to 6 = `CLASS_NAMES`, 255 = void, a border of a pixel or two.
        saliency: (size, size) uint8, what the imitated detector believes to be foreground.
        class_names: the classes in the mask, in the order of `CLASS_NAMES`; at least one.
        scene_name: a key of `SCENES`.
        objects: the labelled objects, farthest first; at least one.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    saliency: NDArray[np.uint8]
    class_names: tuple[str, ...]
    scene_name: str
    objects: tuple[SceneObject, ...]


@dataclass(frozen=True)
class _Thing:
    """An object or distractor at its place. ``class_index`` is 0 for a distractor; ``left, top`` may lie outside."""

    class_index: int
    sprite: Sprite
    left: int
    top: int

    @property
    def bottom(self) -> int:
        """Row of the feet: what stands lower is nearer."""
        return self.top + self.sprite.shape.shape[0]

    def windows(self, size: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Slices of the image and of the sprite that lie on each other."""
        width = self.sprite.shape.shape[1]
        top, left = max(self.top, 0), max(self.left, 0)
        bottom, right = max(min(self.bottom, size), top), max(min(self.left + width, size), left)
        inside = (slice(top - self.top, bottom - self.top), slice(left - self.left, right - self.left))
        return (slice(top, bottom), slice(left, right)), inside


# --- layout ---------------------------------------------------------------------------------------------------


def _instance_map(things: list[_Thing], size: int) -> NDArray[np.intp]:
    """Which thing shows at each pixel, (size, size): 0 for none, k+1 for the k-th, -1 for void; the last is nearest.

    Each object has a ring of void, one pixel wide, which it also casts on what is behind it. A distractor has no
    ring of its own, but where it cuts into an object, the cut is as uncertain as any outline.
    """
    instances = np.zeros((size, size), dtype=np.intp)
    is_object = np.array([False, *(thing.class_index > 0 for thing in things), False])  # the last entry is void's: -1
    for number, thing in enumerate(things, start=1):
        window, inside = thing.windows(size)
        view, ring = instances[window], thing.sprite.ring[inside]
        view[ring if thing.class_index else ring & is_object[view]] = -1
        view[thing.sprite.shape[inside]] = number
    return instances


def _describe(thing: _Thing, number: int, instances: NDArray[np.intp]) -> SceneObject:
    """Measure what shows of the thing that carries ``number`` in the instance map."""
    window, inside = thing.windows(len(instances))
    visible = instances[window] == number
    rows, columns = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
    extent = max(int(np.ptp(rows)), int(np.ptp(columns))) + 1 if len(rows) else 0
    part = int((visible & thing.sprite.part[inside]).sum())
    return SceneObject(CLASS_NAMES[thing.class_index - 1], extent, int(visible.sum()), part)


def _is_recognisable(thing: _Thing, seen: SceneObject) -> bool:
    return (
        seen.extent >= _MIN_EXTENT
        and seen.num_pixels >= max(_MIN_PIXELS, _MIN_VISIBLE * thing.sprite.shape.sum())
        and seen.num_part_pixels >= max(1, _MIN_VISIBLE * thing.sprite.part.sum())
    )


def _all_recognisable(things: list[_Thing], size: int) -> bool:
    instances = _instance_map(things, size)
    return all(
        _is_recognisable(thing, _describe(thing, number, instances))
        for number, thing in enumerate(things, start=1)
        if thing.class_index
    )


def _random_place(sprite: Sprite, horizon: int, size: int, rng: np.random.Generator) -> tuple[int, int]:
    """Left and top of a sprite: feet on the ground and whole inside the image, but in one case of six cut off."""
    height, width = sprite.shape.shape
    lowest = min(horizon + 0.06 * size + 0.25 * height, size - 1)
    bottom = max(rng.uniform(lowest, size + 1), min(height, size))
    left = rng.uniform(0, size - width) if width < size else (size - width) / 2
    if rng.random() < 1 / 6:
        cut = rng.uniform(0.1, 0.4)
        left, bottom = ((-cut * width, bottom), (size - (1 - cut) * width, bottom), (left, size + cut * height))[
            rng.integers(3)
        ]
    return round(left), round(bottom - height)


def _add(
    things: list[_Thing], class_index: int, look: Look, extent: float, stage: "_Stage", rng: np.random.Generator
) -> list[_Thing]:
    """Put one more thing where every object stays recognisable; smaller, if it must be; not at all, if it cannot."""
    for _ in range(4):
        sprite = render_object(look, extent, rng, stage.light)
        for _ in range(6):
            left, top = _random_place(sprite, stage.horizon, stage.size, rng)
            candidate = sorted([*things, _Thing(class_index, sprite, left, top)], key=lambda thing: thing.bottom)
            if _all_recognisable(candidate, stage.size):
                return candidate
        extent = max(0.75 * extent, _smallest(stage.size))
    return things


@dataclass(frozen=True)
class _Stage:
    """What things need to know of the scene that they are put in."""

    size: int
    horizon: int
    light: tuple[float, float]


def _smallest(size: int) -> float:
    return max(0.14 * size, _MIN_EXTENT + 4)


def _random_extent(size: int, rng: np.random.Generator) -> float:
    """An object's extent in pixels: small, medium and large are about equally frequent."""
    low, high = ((0.14, 0.28), (0.28, 0.5), (0.5, 0.95))[rng.integers(3)]
    return max(rng.uniform(low, high) * size, _smallest(size))


def _arrange(first: str, stage: _Stage, rng: np.random.Generator) -> list[_Thing]:
    """Choose and place the objects and distractors of a scene, farthest first."""
    things: list[_Thing] = []
    count = 1 + int(rng.choice(3, p=_SHARE_OF_COUNTS))
    names = [first, *rng.choice(CLASS_NAMES, count - 1)]
    # The largest is placed first: the others find room around it, whereas it would not find room among them.
    extents = [_random_extent(stage.size, rng) for _ in names]
    for k in np.argsort(extents)[::-1]:
        name = str(names[k])
        things = _add(things, CLASS_NAMES.index(name) + 1, CLASSES[name], extents[k], stage, rng)
    for kind in rng.choice(list(DISTRACTORS), rng.integers(0, 4)):
        things = _add(things, 0, DISTRACTORS[kind], rng.uniform(0.12, 0.34) * stage.size, stage, rng)
    return things


# --- image, mask and saliency ---------------------------------------------------------------------------------------


def _cast_shadow(image: NDArray[np.float32], thing: _Thing) -> None:
    """Darken the ground under a thing, in place."""
    height, width = thing.sprite.shape.shape
    y, x = np.ogrid[: len(image), : len(image)]
    across = (x - thing.left - width / 2) / (0.5 * width)
    down = (y - thing.bottom + 0.03 * height + 1) / (0.05 * height + 1.5)
    image *= (1 - 0.42 * np.exp(-(across**4) - down**2))[..., None]


def _compose(things: list[_Thing], image: NDArray[np.float32]) -> None:
    """Paint the things over the scene, farthest first, in place."""
    for thing in things:
        _cast_shadow(image, thing)
        window, inside = thing.windows(len(image))
        image[window] *= 1 - thing.sprite.alpha[inside][..., None]
        image[window] += thing.sprite.colour[inside]


def _photograph(image: NDArray[np.float32], light: tuple[float, float], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Add what a camera adds: light gradient, colour cast, blur and noise. (size, size, 3) in, the same out."""
    size = len(image)
    line = np.linspace(-1, 1, size)
    towards = light[0] * line[None, :] + light[1] * line[:, None]
    gain = 1 + rng.uniform(0, 0.14) * towards
    cast = rng.uniform(0.93, 1.07, 3) * rng.uniform(0.88, 1.08)
    sigma = rng.uniform(0.2, 0.75) * size / 128
    image = ndimage.gaussian_filter(image * gain[..., None] * cast, (sigma, sigma, 0), truncate=3.0)
    noise = rng.uniform(1.5, 6) * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(np.round(image + noise), 0, 255).astype(np.uint8)


def _read_mask(things: list[_Thing], instances: NDArray[np.intp]) -> NDArray[np.uint8]:
    """Turn the instance map into the mask of classes, (size, size)."""
    table = np.array([0, *(thing.class_index for thing in things), VOID], dtype=np.uint8)  # void is -1: the last entry
    return table[instances]


def _detector_score(thing: _Thing, size: int, rng: np.random.Generator) -> float:
    """How much the detector believes in a thing, in [0, 1]: small objects are missed more often than large ones."""
    is_small = max(thing.sprite.shape.shape) < 0.28 * size
    chance = (0.75 if is_small else 0.95) if thing.class_index else 0.46
    return rng.uniform(0.66, 1.0) if rng.random() < chance else rng.uniform(0.02, 0.4)


def _imitate_saliency(things: list[_Thing], size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Imitate a saliency detector: objects missed, distractors included, regions lost, edges warped and blurred.

    (size, size) grey levels; over many scenes the part above one half has an IoU of .76 with the true foreground.
    """
    belief = np.full((size, size), rng.uniform(0, 0.08), dtype=np.float32)
    for thing in things:
        window, inside = thing.windows(size)
        alpha = thing.sprite.alpha[inside]
        belief[window] += alpha * (_detector_score(thing, size, rng) - belief[window])
    rows, columns = np.mgrid[:size, :size].astype(np.float32)
    bend = 0.016 * size
    rows += bend * smooth_noise(rng, size, 9, 9)
    columns += bend * smooth_noise(rng, size, 9, 9)
    warped = ndimage.map_coordinates(belief, (rows, columns), order=1, mode="nearest")
    warped *= 1 + 0.16 * smooth_noise(rng, size, 6, 6)  # doubt comes in regions: parts of an object fall below one half
    blurred = ndimage.gaussian_filter(warped, rng.uniform(0.7, 1.5) * size / 128)
    return np.clip(np.round(255 * blurred), 0, 255).astype(np.uint8)


def draw_scene(seed: int, index: int, size: int = 128) -> Scene:
    """Draw one scene.

    Args:
        seed: of the data set, 0 or more.
        index: number of the scene in the data set, 0 or more.
        size: side of the image in pixels, at least 64.

    Returns:
        The scene; equal arguments give equal scenes, in any order of drawing.

    Raises:
        ValueError: if an argument is too small.
    """
    if size < _MIN_SIZE:
        raise ValueError(f"size must be at least {_MIN_SIZE}, got {size}")
    rng = np.random.default_rng([seed, index, size])
    first = CLASS_NAMES[rng.integers(len(CLASS_NAMES))]
    preferred = PREFERRED_SCENES[first]
    others = [name for name in SCENES if name != preferred]
    scene_name = preferred if rng.random() < _CONTEXT_BIAS else others[rng.integers(len(others))]
    angle = rng.uniform(-0.8, 0.8)
    light = (float(np.sin(angle)), -float(np.cos(angle)))  # from above, somewhat from the side

    canvas, horizon = paint_scene(scene_name, size, rng)
    things = _arrange(first, _Stage(size, horizon, light), rng)
    instances = _instance_map(things, size)
    objects = tuple(_describe(t, number, instances) for number, t in enumerate(things, start=1) if t.class_index)
    _compose(things, canvas)
    return Scene(
        image=_photograph(canvas, light, rng),
        mask=_read_mask(things, instances),
        saliency=_imitate_saliency(things, size, rng),
        class_names=tuple(name for name in CLASS_NAMES if any(o.class_name == name for o in objects)),
        scene_name=scene_name,
        objects=objects,
    )


# --- files ----------------------------------------------------------------------------------------------------------


def _write_scene(index: int, folder: Path, seed: int, size: int) -> tuple[str, ...]:
    """Draw scene ``index``, write its three files below ``folder``, and return its labels."""
    scene = draw_scene(seed, index, size)
    name = f"{index:06d}"
    # Without chroma subsampling: it would smear the colours of parts that are few pixels wide.
    Image.fromarray(scene.image).save(folder / "JPEGImages" / f"{name}.jpg", quality=95, subsampling=0)
    mask = Image.fromarray(scene.mask).convert("P")
    mask.putpalette(VOC_PALETTE.ravel().tolist())
    mask.save(folder / "SegmentationClass" / f"{name}.png")
    Image.fromarray(scene.saliency).save(folder / "Saliency" / f"{name}.png")
    return scene.class_names


def make_mini(
    root: Path,
    num_train: int,
    num_val: int,
    *,
    size: int = 128,
    seed: int = 0,
    num_workers: int = 1,
    progress: Callable[..., Iterable[Any]] | None = None,
) -> None:
    """Write a mini data set in the layout of PASCAL VOC, with ``Saliency/`` and ``labels.csv``.

    Scene k is the file ``00000k``; the first ``num_train`` are the training split, the others the validation split. The
    files depend on ``seed`` and ``size`` only. They are drawn into a temporary folder beside ``root`` that is renamed
    at the end, so that ``root`` is complete if it exists.

    Args:
        root: folder to make; it may exist if it is empty.
        num_train: number of training images, at least 1.
        num_val: number of validation images.
        size: side of the images in pixels, at least 64.
        seed: of the data set.
        num_workers: number of processes; more than one starts new interpreters.
        progress: called as ``progress(iterable, total=..., desc=...)``, such as ``tqdm.tqdm``.

    Raises:
        ValueError: if a number is too small.
        FileExistsError: if ``root`` is a file or a folder that is not empty.
    """
    if num_train < 1 or num_val < 0 or size < _MIN_SIZE or seed < 0:
        raise ValueError(f"no data set has {num_train} + {num_val} images of size {size} from seed {seed}")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"{root} exists and is not an empty folder; remove it or choose another place")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}.", suffix=".partial", dir=root.parent) as temporary:
        folder = Path(temporary) / root.name  # created by mkdir with the usual permissions, unlike the temporary folder
        for name in ("JPEGImages", "SegmentationClass", "Saliency", "ImageSets/Segmentation"):
            (folder / name).mkdir(parents=True)
        total = num_train + num_val
        write = functools.partial(_write_scene, folder=folder, seed=seed, size=size)
        # A forked process would inherit locks of torch's threads, which a notebook has loaded.
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(min(num_workers, total), mp_context=spawn) if num_workers > 1 else None
        try:
            results = pool.map(write, range(total), chunksize=8) if pool else map(write, range(total))
            labels = list(progress(results, total=total, desc="mini data set") if progress else results)
        finally:
            if pool:
                pool.shutdown(cancel_futures=True)
        ids = [f"{index:06d}" for index in range(total)]
        for split, members in (("train", ids[:num_train]), ("val", ids[num_train:])):
            text = "".join(f"{name}\n" for name in members)
            (folder / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(text, encoding="utf-8")
        rows = "".join(f"{name}.jpg,{';'.join(names)}\n" for name, names in zip(ids, labels, strict=True))
        (folder / "labels.csv").write_text("image,labels\n" + rows, encoding="utf-8")
        if root.exists():
            root.rmdir()
        folder.rename(root)
