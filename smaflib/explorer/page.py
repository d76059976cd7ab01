"""The explorer as a page that needs neither a kernel nor a network, for reports and saved notebooks.

The page holds the maps of a few images at the network's own resolution in 8 bits, and computes the rest in the browser
(``static/explorer_page.js``).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smaflib import cams as cams_module
from smaflib import files
from smaflib.cams import FUSIONS, fuse_cams, fusion_rules
from smaflib.data.transforms import scaled_size
from smaflib.explorer.state import COLOR_TABLE, CURVE_SCORES, THUMBNAIL_SIDE, Gallery, data_url
from smaflib.report.html import page_text
from smaflib.report.palette import class_colors
from smaflib.runs import Run

STATIC = Path(__file__).parent / "static"
CONSTANTS = ("PEAK_EPSILON", "REFERENCE_EXTENT", "SIZE_SHARPNESS")  # of smaflib.cams, for the same in JavaScript
MAX_BYTES = 4_900_000  # of the images in a page: as many as fit are included
PAGE_SIDE = 512  # longest side of an image in the page, in pixels; larger ones are shrunk together with their maps
MAX_OTHERS = 6  # classes outside the image label whose maps are kept: those that respond most


def explorer_page(gallery: Gallery, index: int = 0) -> str:
    """A self-contained HTML page that explores as many images as fit, and begins with image ``index``."""
    first, rules = gallery.first_settings(index), fusion_rules(gallery.config.attention.fusion)
    images, left = list[dict[str, Any]](), MAX_BYTES
    for number in range(len(gallery.samples)):
        image = page_image(gallery, number)
        left -= len(json.dumps(image))
        if images and left < 0:
            break
        images.append(image)
    if index >= len(images):
        index, first = 0, gallery.first_settings(0)
    facts = {
        "scales": list(gallery.scales),
        "rules": rules,
        # The browser cannot run a custom rule; its maps are computed here, from all scales.
        "computed_rules": [rule for rule in rules if rule not in FUSIONS],
        "curve_scores": list(CURVE_SCORES),
        "lut": base64.b64encode(COLOR_TABLE).decode(),
        "constants": {name.lower(): getattr(cams_module, name) for name in CONSTANTS},
        "start": {"index": index, "cls": first.class_number, "role": gallery.roles[0], "fusion": first.fusion}
        | {"bg": first.bg_score, "denoise": True, "reactivate": True, "opacity": 0.75},
        "images": images,
    }
    css, board, page = (
        (STATIC / name).read_text(encoding="utf-8")
        for name in ("explorer.css", "explorer_board.js", "explorer_page.js")
    )
    data = json.dumps(facts, allow_nan=False).replace("<", "\\u003c")  # "<" inside a script element could end it
    parts = {"title": f"Attention explorer · {gallery.title}", "num_images": len(images), "css": css, "data": data}
    return page_text("explorer.html.j2", script=board + page, **parts)


def page_image(gallery: Gallery, index: int) -> dict[str, Any]:
    """One image for ``static/explorer_page.js``: picture, ground truth as run lengths, maps in 8 bits.

    Maps of each network: ``data``, a byte per cell, scale by scale, class by class, where 255 stands for the map's peak
    in ``peaks`` (S, C); with a custom fusion rule also ``fused``, the fused classes one below the other as a grey PNG.
    """
    label, names = list(gallery.first_settings(index).image_label), gallery.names(index)
    sample, flip = gallery.samples[index], gallery.config.attention.flip
    rule, scales = gallery.config.attention.fusion, gallery.scales
    factor = min(1.0, PAGE_SIDE / max(sample.image.shape[-2:]))
    image, mask = _shrunk(sample.image, factor, "area"), sample.mask
    if mask is not None:
        mask = _shrunk(mask[None], factor, "nearest-exact")[0]
    by_role = {role: gallery.cams(index, role, flip) for role in gallery.roles}
    response = torch.stack([cam.amax(dim=(1, 2)) for cams in by_role.values() for cam in cams]).amax(dim=0)
    others = [number for number in response.argsort(descending=True).tolist() if number not in label]
    classes = sorted([*label, *others[:MAX_OTHERS]])
    size = (image.shape[-2], image.shape[-1])
    maps: dict[str, dict[str, Any]] = {}
    for role, cams in by_role.items():
        kept = [_shrunk(cam[classes], factor, "area") for cam in cams]
        levels, peaks = quantize(kept)
        data = b"".join(level.numpy().tobytes() for level in levels)
        maps[role] = {"data": base64.b64encode(data).decode(), "peaks": peaks.tolist()}
        if rule not in FUSIONS:
            fused = (fuse_cams(kept, size, rule, scales) * 255).round().to(torch.uint8)
            maps[role]["fused"] = {rule: data_url(fused.flatten(0, 1)[None], kind="PNG")}
    return {
        "name": sample.image_id,
        "thumb": data_url(sample.image, THUMBNAIL_SIDE),
        "class_names": list(names),
        "colors": class_colors(len(names)),
        "likeliest": gallery.probabilities(index),
        "size": list(size),
        "shrunk": factor < 1,
        # Small pictures stay exact; in large ones the loss is invisible.
        "picture": data_url(image, kind="PNG" if max(size) <= 160 else "JPEG"),
        "truth": None if mask is None else run_lengths(mask),
        "label": label,
        "classes": classes,
        "shapes": [list(level.shape[-2:]) for level in levels],
        "maps": maps,
    }


def quantize(cams: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Round maps, per scale (K, h_s, w_s) and non-negative, to 8 bits, and the peaks (S, K) that 255 stands for."""
    peaks = torch.stack([cam.amax(dim=(1, 2)) for cam in cams])
    shares = [cam / peak.clamp(min=1e-12)[:, None, None] for cam, peak in zip(cams, peaks, strict=True)]
    return [(share * 255).round().to(torch.uint8) for share in shares], peaks


def run_lengths(mask: Tensor) -> list[int]:
    """A mask (H, W) row by row as value, count, value, count, ..."""
    values, counts = mask.flatten().unique_consecutive(return_counts=True)
    return torch.stack([values.long(), counts], dim=1).flatten().tolist()


def _shrunk(values: Tensor, factor: float, mode: str) -> Tensor:
    """(C, H, W) resized by a factor of at most 1."""
    if factor == 1:
        return values
    resized = F.interpolate(values[None].float(), size=scaled_size(values.shape[-2:], factor), mode=mode)[0]
    return resized.round().to(torch.uint8) if values.dtype == torch.uint8 else resized


def write_explorer(run: Run, num_images: int = 8) -> Path:
    """Write ``explorer.html`` of a run's first images; raises what :meth:`Gallery.of_run` raises."""
    path = run.path("explorer.html")
    files.write_text(path, explorer_page(Gallery.of_run(run, num_images)))
    return path


def save_page(gallery: Gallery, index: int = 0) -> Path:
    """Write the page of a gallery into the working directory."""
    path = Path(f"explorer_{gallery.title}.html".replace(" ", "_"))
    files.write_text(path, explorer_page(gallery, index=index))
    return path
