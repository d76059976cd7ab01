"""Sliders for one step of the method, inside of the notebook that explains the step.

The explorer shows the whole chain at once; these show one step, and every control has the name that its setting has in
the config. In JupyterLab the sliders move the picture. Where nobody can move them (a run of ``smaf run``, a page), the
output is the picture that they begin with, and nothing else.
"""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ipywidgets as widgets
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from smaflib.cams import at_size, fuse_cams, fusion_rules
from smaflib.config import CrfConfig, PseudoMaskConfig
from smaflib.data import Sample, Samples
from smaflib.evaluation import image_score
from smaflib.maps import AttentionMaps
from smaflib.reactivation import denoise, hard_labels, reactivate, with_background_score
from smaflib.report.plots import (
    Panel,
    draw_outline,
    draw_pixel_row,
    overlay_map,
    overlay_mask,
    picture,
    show_panel,
    show_panels,
    strongest_map,
)
from smaflib.runtime import PROGRESS_FILE

CRF_RANGES: dict[str, tuple[str, float, float, float]] = {  # name in the config: what it is, least, most, step
    "iterations": ("how often each pixel adapts to the others", 0, 20, 1),
    "gt_prob": ("trust in the labels that it starts from", 0.2, 0.99, 0.01),
    "gaussian_sxy": ("reach of the smoothness kernel, in pixels", 0.5, 20, 0.5),
    "gaussian_compat": ("weight of the smoothness kernel", 0, 20, 0.5),
    "bilateral_sxy": ("reach of the appearance kernel, in pixels", 1, 120, 1),
    "bilateral_srgb": ("reach of the appearance kernel, in steps of colour", 1, 60, 1),
    "bilateral_compat": ("weight of the appearance kernel", 0, 20, 0.5),
}

DPI = 90  # of the picture; half the time of a printed figure's, and enough for a screen


@dataclass(frozen=True)
class Knob:
    """A setting that a slider or a menu moves.

    Attributes:
        value: to begin with; a whole number moves in whole numbers.
        least: the slider's left end.
        most: its right end.
        step: from one value to the next.
        options: of a menu, in place of a slider.
        gloss: what it is, shown when the pointer rests on it.
        while_moving: whether the picture follows a slider that is being dragged, or waits until it is let go.
    """

    value: Any
    least: float = 0.0
    most: float = 1.0
    step: float = 0.01
    options: tuple[str, ...] = ()
    gloss: str = ""
    while_moving: bool = True

    def widget(self, name: str) -> Any:
        """The control, with the setting's name before it."""
        look: dict[str, Any] = {
            "description": name,
            "layout": {"width": "300px"},
            "style": {"description_width": "120px"},
        }
        if self.options:
            return widgets.Dropdown(options=self.options, value=self.value, tooltip=self.gloss, **look)
        kind = widgets.IntSlider if isinstance(self.value, int) else widgets.FloatSlider
        look |= {"min": self.least, "max": self.most, "step": self.step, "continuous_update": self.while_moving}
        return kind(value=self.value, tooltip=self.gloss, **look)


class Sliders:
    """Controls above a picture that is drawn anew when one of them moves; the last line of a cell shows them.

    No widget exists before somebody looks: nbclient keeps the state of every widget in the executed notebook.

    Args:
        draw: takes the values by name, gives the figure.
        knobs: by the name of the setting that they stand for.
    """

    def __init__(self, draw: Callable[..., Figure], knobs: Mapping[str, Knob]) -> None:
        self._draw, self._knobs = draw, dict(knobs)

    @cached_property
    def controls(self) -> dict[str, Any]:
        """The widgets by name, to be set from code too: ``sliders.controls["bg_score"].value = 0.5``."""
        controls = {name: knob.widget(name) for name, knob in self._knobs.items()}
        for control in controls.values():
            control.observe(self._redraw, "value")
        return controls

    @cached_property
    def picture(self) -> Any:
        """The widget that shows the figure, as a PNG."""
        return widgets.Image(value=self._png(), format="png", layout={"max_width": "100%"})

    @cached_property
    def trouble(self) -> Any:
        """The widget that says why there is no new picture; empty where there is one."""
        return widgets.HTML()

    @cached_property
    def widget(self) -> Any:
        """All of it."""
        columns = {"grid_template_columns": "repeat(auto-fill, minmax(310px, 1fr))", "width": "100%"}
        box = widgets.VBox(
            [widgets.GridBox([*self.controls.values()], layout=columns), self.trouble, self.picture],
        )
        box.add_class("smaf-sliders")
        return box

    def _png(self, **values: Any) -> bytes:
        figure = self._draw(**({name: knob.value for name, knob in self._knobs.items()} | values))
        figure.set_dpi(DPI)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()  # once; savefig goes over a figure with a constrained layout twice
        content = io.BytesIO()
        Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).save(content, "PNG")
        return content.getvalue()

    def _redraw(self, change: Any) -> None:
        shown = self.picture  # the first look draws it
        try:
            shown.value = self._png(**{name: control.value for name, control in self.controls.items()})
            self.trouble.value = ""
        except ValueError as error:  # such as all weights at 0; in a callback it would end in a log that nobody reads
            self.trouble.value = f'<b role="alert">{html.escape(str(error))}</b>'

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        # A kernel of the runner has nobody at its sliders: they would stay behind in the notebook and move nothing.
        alone = bool(os.environ.get(PROGRESS_FILE))
        png = self._png() if alone else self.picture.value
        bundle = {} if alone else self.widget._repr_mimebundle_(**options)
        return bundle | {"image/png": base64.b64encode(png).decode(), "text/plain": "sliders over a picture"}


def scale_sliders(samples: Samples, maps: AttentionMaps, bg_score: float, fusion: str = "sum") -> Sliders:
    """Weigh the scales yourself: the maps of an image's first class, their fusion, and the mask that it makes.

    Args:
        samples: the images to choose from; with their masks, an IoU stands on the mask.
        maps: of the teacher or the student.
        bg_score: the background's score, in (0, 1].
        fusion: the rule to begin with.
    """
    scales, cache = maps.scales, dict[int, tuple[list[Tensor], tuple[int, int]]]()

    def draw(image: int, fusion: str, **weights: float) -> Figure:
        sample, number = samples[image], samples.files[image].labels[0]
        if image not in cache:
            cache[image] = maps.read(sample.image_id)
        (cams, size), factors = cache[image], [*weights.values()]
        if not any(factors):
            raise ValueError("every scale has weight 0; give one of them more")
        fused = fuse_cams(cams, size, fusion, scales, factors)
        mask = hard_labels(denoise(fused, sample.image_label), bg_score)
        panels = [overlay_map(sample.image, at_size(cam[number], size)) for cam in cams]
        panels.append(overlay_map(sample.image, fused[number]))
        names = samples.class_names
        row = [picture(sample.image), *_outlined(panels, sample, names), overlay_mask(sample.image, mask, names)]
        columns = ["image", *(f"scale {s:g} × {w:g}" for s, w in zip(scales, factors, strict=True)), "fused", "mask"]
        title = f"attention for {samples.class_names[number]}; background score {bg_score:g}"
        captions = ["" for _ in columns[:-1]] + [_score(mask, sample, len(samples.class_names))]
        return show_panels([row], columns, title=title, captions=[captions])

    if not len(samples):
        raise ValueError("scale_sliders needs at least one image; give it train.shown(6)")
    knobs = {"image": Knob(0, 0, len(samples) - 1, 1), "fusion": Knob(fusion, options=fusion_rules(fusion))}
    knobs |= {f"weight of scale {scale:g}": Knob(1.0, 0.0, 2.0, 0.1) for scale in scales}
    return Sliders(draw, knobs)


def row_sliders(sample: Sample, fused: Tensor, bg_score: float, class_names: tuple[str, ...]) -> Sliders:
    """Move the background score, and the row of pixels that the curves follow.

    Args:
        sample: the image, with its mask where there is one.
        fused: (K, H, W) in [0, 1], fused and not denoised.
        bg_score: to begin with, in (0, 1].
        class_names: of the K classes.
    """
    denoised = denoise(fused, sample.image_label)
    strongest = strongest_map(denoised)

    def draw(bg_score: float, row: int) -> Figure:
        target, mask = reactivate(denoised, bg_score), hard_labels(denoised, bg_score)
        panels = [overlay_map(sample.image, each) for each in (strongest, strongest_map(target[1:]))]
        panels = [picture(sample.image), *_outlined(panels, sample, class_names)]
        panels.append(overlay_mask(sample.image, mask, class_names))
        names = ["image", "denoised", "target, reactivated", "mask"]
        figure = Figure(figsize=(8, 5.4), layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=(1, 1.5))  # type: ignore[misc]  # two, as asked for
        for axis, panel, name in zip(above.subplots(1, len(panels)), panels, names, strict=True):
            show_panel(axis, panel)
            axis.axhline(row, color="white", linewidth=1, linestyle="--")
            axis.set_title(name, fontsize=9)
        steps = {
            "with background": with_background_score(denoised, bg_score)[:, row],
            "target: each pixel divided by its highest score": target[:, row],
        }
        truth = None if sample.mask is None else sample.mask[row]
        draw_pixel_row(below.subplots(2, 1, sharex=True), steps, class_names, sample.image_label.bool().tolist(), truth)
        score = _score(mask, sample, len(class_names))
        figure.suptitle(f"row {row}, background score {bg_score:.2f}{score and ': ' + score}", fontsize=11)
        return figure

    y = int(strongest.amax(dim=1).argmax())
    knobs = {
        "bg_score": Knob(bg_score, min(0.01, bg_score), max(0.98, bg_score)),
        "row": Knob(y, 0, len(strongest) - 1, 1),
    }
    return Sliders(draw, knobs)


def crf_sliders(
    sample: Sample, denoised: Tensor, bg_score: float, config: PseudoMaskConfig, class_names: tuple[str, ...]
) -> Sliders:
    """Turn every knob of the dense CRF, under its name in the config; the mask follows when a slider is let go.

    Args:
        sample: the image, with its mask where there is one.
        denoised: (K, H, W) in [0, 1], fused and denoised.
        bg_score: the background's score, in (0, 1].
        config: whose ``crf`` the sliders begin with.
        class_names: of the K classes.
    """
    from smaflib.pseudo_masks import pseudo_mask  # not above: notebooks 03 and 04 do not depend on the CRF

    with_crf, before = config.model_copy(update={"refine": "crf"}), hard_labels(denoised, bg_score)

    def draw(**knobs: float) -> Figure:
        crf = CrfConfig(**(config.crf.model_dump() | knobs))
        after = pseudo_mask(sample.image, denoised, bg_score, with_crf.model_copy(update={"crf": crf}))
        masks = {"before the CRF": before, "after the CRF": after}
        masks |= {} if sample.mask is None else {"ground truth": sample.mask}
        row = [picture(sample.image), *(overlay_mask(sample.image, mask, class_names) for mask in masks.values())]
        captions = ["", *(_score(mask, sample, len(class_names)) for mask in (before, after)), ""]
        return show_panels([row], ["image", *masks], title="the dense CRF", side=2.4, captions=[captions])

    knobs = {}
    for name, (gloss, least, most, step) in CRF_RANGES.items():
        value = getattr(config.crf, name)
        # A run's own setting must stay what it is, even where it lies beyond the usual.
        ends = (min(least, value), max(most, value), step)
        knobs[name] = Knob(value, *ends, gloss=gloss, while_moving=False)
    return Sliders(draw, knobs)


def _outlined(panels: list[Panel], sample: Sample, class_names: Sequence[str]) -> list[Panel]:
    mask = sample.mask
    return panels if mask is None else [draw_outline(panel, mask, class_names) for panel in panels]


def _score(mask: Tensor, sample: Sample, num_classes: int) -> str:
    """The mean IoU as a caption; nothing without ground truth."""
    if sample.mask is None:
        return ""
    score = image_score(mask, sample.mask, num_classes)
    return "" if np.isnan(score) else f"mean IoU {score:.0%}"
