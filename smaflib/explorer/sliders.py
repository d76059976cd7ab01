"""Sliders for one step of the method, in the notebook that explains the step.

Every control has the name of its setting in the config. Where it cannot be moved (``smaf run``, a page), the output is
the first picture alone.
"""

from __future__ import annotations

import base64
import functools
import io
import os
from collections.abc import Callable, Mapping
from typing import Any

import ipywidgets as widgets
from IPython.display import Image as Picture
from IPython.display import display
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from smaflib.cams import fuse_cams, fusion_rules
from smaflib.config import CrfConfig, EvaluationConfig, PseudoMaskConfig
from smaflib.data import Sample, Samples
from smaflib.evaluation import SIZES, image_score
from smaflib.maps import AttentionMaps
from smaflib.reactivation import denoise, hard_labels, reactivate, with_background_score
from smaflib.report import plots
from smaflib.runtime import PROGRESS_FILE

CRF_RANGES: dict[str, tuple[str, float, float, float]] = {  # setting: tooltip, minimum, maximum, step
    "iterations": ("how often each pixel adapts to the others", 0, 20, 1),
    "gt_prob": ("trust in the labels that it starts from", 0.2, 0.99, 0.01),
    "gaussian_sxy": ("reach of the smoothness kernel, in pixels", 0.5, 20, 0.5),
    "gaussian_compat": ("weight of the smoothness kernel", 0, 20, 0.5),
    "bilateral_sxy": ("reach of the appearance kernel, in pixels", 1, 120, 1),
    "bilateral_srgb": ("reach of the appearance kernel, in steps of colour", 1, 60, 1),
    "bilateral_compat": ("weight of the appearance kernel", 0, 20, 0.5),
}


def scale_sliders(
    samples: Samples,
    maps: AttentionMaps,
    bg_score: float,
    fusion: str = "sum",
    size_limits: tuple[float, float] = EvaluationConfig().size_limits,
) -> Any:
    """Weigh the scales: maps of one class of an image, their fusion, and the mask with its IoU if known.

    The menu names each image's classes, smallest object first, with their share of the image if that is known.
    """
    read, names = functools.cache(maps.read), samples.class_names
    objects: list[tuple[float, str, tuple[int, int]]] = []
    for index, sample in enumerate(samples):
        for k in samples.files[index].labels:
            share = float("nan") if sample.mask is None else float((sample.mask == k + 1).float().mean())
            size = f", {share:.1%}, {SIZES[sum(share >= limit for limit in size_limits)]}" if share == share else ""
            objects.append((share, f"{names[k]}{size}, image {index + 1}", (index, k)))
    objects.sort()

    def draw(object: tuple[int, int], fusion: str, **weights: float) -> Figure:
        sample, number = samples[object[0]], object[1]
        cams, size = read(sample.image_id)
        fused = fuse_cams(cams, size, fusion, maps.scales, [*weights.values()])
        mask = hard_labels(denoise(fused, sample.image_label), bg_score)
        title = f"background threshold {bg_score:g}{_score(mask, sample, len(names), '; ')}"
        look: dict[str, Any] = {"bg_score": bg_score, "class_names": names, "title": title}
        return plots.show_scales(sample.image, cams, fused, mask, maps.scales, number, sample.mask, **look)

    rules = {"value": fusion, "options": fusion_rules(fusion)}
    weights = {f"weight of scale {scale:g}": slider_options(1.0, 0.0, 2.0, 0.1) for scale in maps.scales}
    menu: dict[str, Any] = {"value": objects[0][2], "options": [(label, chosen) for _, label, chosen in objects]}
    return sliders(draw, {"object": menu, "fusion": rules} | weights)


def row_sliders(sample: Sample, fused: Tensor, bg_score: float, class_names: tuple[str, ...]) -> Any:
    """Move the background threshold, and the row of pixels that the curves follow, on fused maps (K, H, W)."""
    denoised = denoise(fused, sample.image_label)
    strongest = plots.strongest_map(denoised)

    def draw(bg_score: float, row: int) -> Figure:
        target, mask = reactivate(denoised, bg_score), hard_labels(denoised, bg_score)
        maps = (plots.overlay_map(sample.image, cam) for cam in (strongest, plots.strongest_map(target[1:])))
        outlined = (plots.draw_outline(panel, sample.mask, class_names) for panel in maps)
        panels = (plots.picture(sample.image), *outlined, plots.overlay_mask(sample.image, mask, class_names))
        figure = Figure(figsize=(8, 5.4), layout="constrained")
        *above, upper, lower = figure.subplot_mosaic("ABCD;EEEE;FFFF", height_ratios=(4, 3, 3)).values()
        titles = ("image", "denoised", "target, reactivated", "mask")
        for axis, title, panel in zip(above, titles, panels, strict=True):
            plots.show_panel(axis, panel)
            axis.axhline(row, color="white", linewidth=1, linestyle="--")
            axis.set_title(title, fontsize=9)
        steps = {
            "with background": with_background_score(denoised, bg_score)[:, row],
            "target: each pixel divided by its highest score": target[:, row],
        }
        truth = None if sample.mask is None else sample.mask[row]
        plots.draw_pixel_row([upper, lower], steps, class_names, sample.image_label.bool().tolist(), truth)
        score = _score(mask, sample, len(class_names), "; ")
        figure.suptitle(f"row {row}, background threshold {bg_score:.2f}{score}", fontsize=11)
        return figure

    first_row = int(strongest.amax(dim=1).argmax())
    controls = {
        "bg_score": slider_options(bg_score, 0.01, 0.98, 0.01),
        "row": slider_options(first_row, 0, len(strongest) - 1, 1),
    }
    return sliders(draw, controls)


def crf_sliders(
    sample: Sample, denoised: Tensor, bg_score: float, config: PseudoMaskConfig, class_names: tuple[str, ...]
) -> Any:
    """Change every setting of the dense CRF on denoised maps (K, H, W); the mask follows when a slider is released."""
    from smaflib.pseudo_masks import pseudo_mask  # not above: notebooks 03 and 04 do not depend on the CRF

    before = hard_labels(denoised, bg_score)

    def draw(**values: float) -> Figure:
        crf = CrfConfig(**(config.crf.model_dump() | values))
        after = pseudo_mask(sample.image, denoised, bg_score, config.model_copy(update={"refine": "crf", "crf": crf}))
        masks = [before, after] if sample.mask is None else [before, after, sample.mask]
        row = [plots.picture(sample.image), *(plots.overlay_mask(sample.image, mask, class_names) for mask in masks)]
        captions = ["", *(_score(mask, sample, len(class_names)) for mask in (before, after)), ""]
        columns = ["image", "before the CRF", "after the CRF", "ground truth"]
        return plots.show_panels([row], columns, title="the dense CRF", side=2.4, captions=[captions])

    controls = {}
    for name, (tooltip, *bounds) in CRF_RANGES.items():
        slider = slider_options(getattr(config.crf, name), *bounds)
        controls[name] = slider | {"tooltip": tooltip, "continuous_update": False}
    return sliders(draw, controls)


def slider_options(value: float, least: float, most: float, step: float) -> dict[str, Any]:
    """Options of a slider for :func:`make_control`; a run's setting may be outside the usual range."""
    return {"value": value, "min": min(least, value), "max": max(most, value), "step": step}


def sliders(draw: Callable[..., Figure], controls: Mapping[str, dict[str, Any]]) -> Any:
    """Controls above the figure that ``draw`` makes of their values, given the options of each control's widget.

    Options such as ``{"value": "a", "options": ["a", "b"]}`` give a menu, others (:func:`slider_options`) a slider.
    """

    def show(**values: Any) -> None:
        display(_png(draw(**values)))

    first = _png(draw(**{name: options["value"] for name, options in controls.items()}))
    if os.environ.get(PROGRESS_FILE):  # a run: nbclient would store the state of widgets that nobody can move
        return first
    look: dict[str, Any] = {"layout": {"width": "330px"}, "style": {"description_width": "140px"}}
    made = {name: make_control(options | look | {"description": name}) for name, options in controls.items()}
    columns = {"grid_template_columns": "repeat(auto-fill, minmax(340px, 1fr))", "width": "100%"}
    box = _Box([widgets.GridBox([*made.values()], layout=columns), widgets.interactive_output(show, made)])
    box.first = first
    return box.add_class("smaf-sliders")


class _Box(widgets.VBox):  # type: ignore[misc]
    """Leaves its first picture in a saved notebook, from which widgets vanish."""

    first: Picture

    def _repr_mimebundle_(self, **options: Any) -> Any:
        return super()._repr_mimebundle_(**options) | {"image/png": base64.b64encode(self.first.data).decode()}


def make_control(options: dict[str, Any]) -> Any:
    """A menu where there are ``options`` to choose from, else a slider for whole numbers or for others."""
    whole = isinstance(options["value"], int)
    kind = widgets.Dropdown if "options" in options else widgets.IntSlider if whole else widgets.FloatSlider
    return kind(**options)


def _png(figure: Figure) -> Picture:
    figure.set_dpi(90)  # enough for a screen, in half the time
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)  # savefig would draw a constrained layout twice
    return Picture(content.getvalue())


def _score(mask: Tensor, sample: Sample, num_classes: int, before: str = "") -> str:
    """The mean IoU as a caption, after ``before``; empty without ground truth."""
    score = float("nan") if sample.mask is None else image_score(mask, sample.mask, num_classes)
    return f"{before}mean IoU {score:.0%}" if score == score else ""
