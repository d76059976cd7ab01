"""The explorer as a page of its own: it needs no kernel and no network, so it stays in saved notebooks and reports.

Widgets vanish when a notebook is saved. The page holds the maps of a few images at the network's own resolution, in 8
bits, and takes the library's steps from there in the reader's browser (``static/explorer_page.js``).
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from smaflib import cams as cams_module
from smaflib import files
from smaflib.cams import FUSIONS, fuse_cams, fusion_rules
from smaflib.data import Sample
from smaflib.data.transforms import scaled_size
from smaflib.explorer.state import (
    COLOR_MAPS,
    CURVE_SCORES,
    THUMBNAIL_SIDE,
    Gallery,
    color_table,
    picture_address,
    rule_title,
    to_bytes,
)
from smaflib.report.html import FIT_FRAMES, page_text
from smaflib.report.palette import class_colors
from smaflib.runs import Run

STATIC = Path(__file__).parent / "static"

MAX_BYTES = 5_000_000
"""The page takes as many images as fit into this."""

PAGE_SIDE = 512
"""Longest side of an image in the page, in pixels; larger ones are shrunk, and their maps with them."""

MAX_OTHERS = 6
"""As many classes beside those of the image label keep their maps, those that respond strongest."""


def explorer_page(
    gallery: Gallery, title: str = "Attention explorer", index: int = 0, max_bytes: int = MAX_BYTES
) -> str:
    """A self-contained HTML page that explores the images of a gallery.

    Args:
        gallery: images and maps; as many images as fit are taken, in its order.
        title: of the page.
        index: of the image to begin with, if it fits into the page.
        max_bytes: the page's size at most.

    Raises:
        ValueError: if not even one image fits.
    """
    names = list(gallery.class_names)
    first = gallery.first_settings(index)
    facts: dict[str, Any] = {
        "class_names": names,
        "colors": class_colors(len(names)),
        "scales": list(gallery.scales),
        # What the browser cannot compute, the page holds: maps of all scales, made here.
        "rules": [[rule, rule_title(rule)] for rule in fusion_rules(first.fusion)],
        "computed_rules": [rule for rule in fusion_rules(first.fusion) if rule not in FUSIONS],
        "curve_scores": list(CURVE_SCORES),
        "luts": {name: base64.b64encode(color_table(name)).decode() for name in COLOR_MAPS},
        "constants": {
            "peak_epsilon": cams_module.PEAK_EPSILON,
            "reference_extent": cams_module.REFERENCE_EXTENT,
            "size_sharpness": cams_module.SIZE_SHARPNESS,
        },
        "start": {
            "index": index,
            "cls": first.class_number,
            "role": gallery.roles[0],
            "fusion": first.fusion,
            "bg": first.bg_score,
            "denoise": True,
            "reactivate": True,
            "opacity": 0.75,
            "colormap": COLOR_MAPS[0],
        },
        "thumbs": [],
        "images": [],
    }
    left = max_bytes - len(_fill(facts, title))
    for number, sample in enumerate(gallery.samples):
        image = page_image(gallery, number)
        thumb = {"name": image["name"], "thumb": picture_address(sample.image, THUMBNAIL_SIDE)}
        left -= len(json.dumps([image, thumb]))
        if left < 0:
            break
        facts["images"].append(image)
        facts["thumbs"].append(thumb)
    if not facts["images"]:
        raise ValueError(f"not even one image fits into a page of {max_bytes} bytes")
    if index >= len(facts["images"]):
        facts["start"] |= {"index": 0, "cls": gallery.first_settings(0).class_number}
    return _fill(facts, title)


def _fill(facts: dict[str, Any], title: str) -> str:
    def read(name: str) -> str:
        return (STATIC / name).read_text(encoding="utf-8")

    return page_text(
        "explorer.html.j2",
        title=title,
        num_images=len(facts["images"]),
        css=read("explorer.css"),
        script=read("explorer_board.js") + read("explorer_page.js"),
        # "<" inside of a script element could end it.
        data=json.dumps(facts, allow_nan=False).replace("<", "\\u003c"),
    )


def page_image(gallery: Gallery, index: int) -> dict[str, Any]:
    """One image as ``static/explorer_page.js`` reads it: picture, ground truth as run lengths, maps in 8 bits.

    Maps: per role ``data``, a byte per cell, scale by scale, class by class; a byte of 255 stands for the map's peak,
    which is in ``peaks`` (S, C). Of a fusion rule of somebody's own also ``fused``, all classes of all scales, as
    :func:`grey_picture`.
    """
    sample = gallery.samples[index]
    flip = gallery.config.attention.flip
    by_role = {role: gallery.cams(index, role, flip) for role in gallery.roles if flip in gallery.flips(index, role)}
    size, sample, by_role = _shrunk(sample, by_role)
    label = torch.nonzero(sample.image_label)[:, 0].tolist()
    classes = _kept_classes(label, list(by_role.values()))
    rule, scales = gallery.config.attention.fusion, gallery.scales
    maps: dict[str, dict[str, Any]] = {}
    for role, cams in by_role.items():
        levels, peaks = quantize([cam[classes] for cam in cams])
        data = b"".join(level.numpy().tobytes() for level in levels)
        maps[role] = {"data": base64.b64encode(data).decode(), "peaks": peaks.tolist()}
        if rule not in FUSIONS:
            fused = fuse_cams([cam[classes] for cam in cams], size, rule, scales)
            maps[role]["fused"] = {rule: grey_picture(fused)}
    return {
        "name": sample.image_id,
        "size": list(size),
        "shrunk": size != tuple(gallery.samples[index].image.shape[-2:]),
        # A small picture is kept as it is; in a large one the loss is invisible.
        "picture": picture_address(sample.image, ending="PNG" if max(size) <= 160 else "JPEG"),
        "truth": None if sample.mask is None else run_lengths(sample.mask),
        "label": label,
        "classes": classes,
        "shapes": [list(cam.shape[-2:]) for cam in next(iter(by_role.values()))],
        "maps": maps,
    }


def grey_picture(maps: Tensor) -> str:
    """Maps (C, H, W) in [0, 1] as one grey PNG (C * H, W) of 8 bits, inside a web address; JPEG would change them."""
    picture = Image.frombytes("L", (maps.shape[2], maps.shape[0] * maps.shape[1]), to_bytes(maps))
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def quantize(cams: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Maps in 8 bits, each class of each scale with a peak of its own.

    Args:
        cams: per scale (K, h_s, w_s), non-negative.

    Returns:
        Per scale uint8 (K, h_s, w_s), and the peaks (S, K) that 255 stands for.
    """
    peaks = torch.stack([cam.amax(dim=(1, 2)) for cam in cams])
    levels = [
        (cam / peak.clamp(min=1e-12)[:, None, None] * 255).round().to(torch.uint8)
        for cam, peak in zip(cams, peaks, strict=True)
    ]
    return levels, peaks


def dequantize(levels: Sequence[Tensor], peaks: Tensor) -> list[Tensor]:
    """The maps that :func:`quantize` has kept, float32: at most half a 255th of the peak from the original."""
    return [level.float() / 255 * peak[:, None, None] for level, peak in zip(levels, peaks, strict=True)]


def run_lengths(mask: Tensor) -> list[int]:
    """A mask (H, W) row by row as value, count, value, count, ..."""
    flat = mask.flatten().numpy()
    starts = np.flatnonzero(np.r_[True, flat[1:] != flat[:-1]])
    counts = np.diff(np.r_[starts, len(flat)])
    return np.stack([flat[starts].astype(int), counts], axis=1).ravel().tolist()


def _kept_classes(label: list[int], by_role: list[list[Tensor]]) -> list[int]:
    """Numbers of the classes in the image label, and of the others that respond strongest anywhere."""
    response = torch.stack([cam.amax(dim=(1, 2)) for cams in by_role for cam in cams]).amax(dim=0)
    others = [number for number in response.argsort(descending=True).tolist() if number not in label]
    return sorted([*label, *others[:MAX_OTHERS]])


def _shrunk(
    sample: Sample, by_role: dict[Any, list[Tensor]]
) -> tuple[tuple[int, int], Sample, dict[Any, list[Tensor]]]:
    """Image, ground truth and maps at a size that fits into the page."""
    height, width = sample.image.shape[-2:]
    factor = PAGE_SIDE / max(height, width)
    if factor >= 1:
        return (height, width), sample, by_role

    def smaller(values: Tensor, mode: str) -> Tensor:
        return F.interpolate(values[None].float(), size=scaled_size(values.shape[-2:], factor), mode=mode)[0]

    image = smaller(sample.image, "area").round().to(torch.uint8)
    mask = None if sample.mask is None else smaller(sample.mask[None], "nearest-exact")[0].to(torch.uint8)
    shrunk = {role: [smaller(cam, "area") for cam in cams] for role, cams in by_role.items()}
    size = (image.shape[-2], image.shape[-1])
    return size, Sample(sample.image_id, image, sample.image_label, None, mask), shrunk


def write_explorer(run: Run, num_images: int = 8) -> Path:
    """Write ``explorer.html`` of a run: its first images, with the maps of teacher and student.

    Raises:
        RunError: if the run has no attention maps yet.
    """
    path = run.path("explorer.html")
    files.write_text(path, explorer_page(Gallery.of_run(run, num_images), f"Attention explorer · run {run.name}"))
    return path


def explorer_frame(gallery: Gallery, index: int = 0, height: int = 960) -> Any:
    """The page inside of a notebook's output, to be the last line of a cell; it stays when the notebook is saved.

    Args:
        gallery: images and maps.
        index: of the image to begin with.
        height: of the frame, in pixels, until the page has told its own.
    """
    from IPython.display import HTML

    page = html.escape(explorer_page(gallery, index=index), quote=True)
    style = f"width: 100%; height: {height}px; border: 0"
    frame = f'<iframe srcdoc="{page}" style="{style}" title="attention explorer"></iframe>'
    return HTML(f"<div>{frame}<script>{FIT_FRAMES}</script></div>")
