"""The attention explorer for JupyterLab: every knob from the image to the mask, and what each does, at once.

``Explorer()`` works right after installation, with the networks that come with the package, and
``Explorer.from_run("mini")`` shows the images of a run. The numbers come from :mod:`smaflib.explorer.state`; this
module only has the controls and sends the pictures. In the browser one board stays and redraws itself
(``static/explorer_board.js``), which is several times as fast as a new figure for each move.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

try:
    import anywidget
    import ipywidgets as widgets
    import traitlets
except ImportError as error:
    raise ImportError(f"the explorer needs {error.name}; install it with: pip install 'smaflib[explorer]'") from error

from smaflib.cams import fusion_rules
from smaflib.config import CrfConfig
from smaflib.errors import InputError
from smaflib.evaluation import mean_over_classes
from smaflib.explorer.sliders import CRF_RANGES
from smaflib.explorer.state import (
    COLOR_MAPS,
    THUMBNAIL_SIDE,
    Curve,
    Exploration,
    Fused,
    Gallery,
    Reading,
    Settings,
    color_table,
    fused_under,
    iou_curve,
    picture_address,
    rule_title,
    to_bytes,
    with_mask,
)
from smaflib.models.pretrained import Role
from smaflib.report.palette import class_colors
from smaflib.runs import Run

STATIC = Path(__file__).parent / "static"
ROLE_NAMES: dict[str, str] = {"teacher": "classifier (teacher)", "student": "student"}

REST_SECONDS = 0.25
"""The CRF starts when nothing has moved for so long: a slider that is being dragged does not wait for it."""


class Board(anywidget.AnyWidget):
    """The part of the explorer that draws. Its traits are what ``static/explorer_widget.js`` reads and writes."""

    _esm = "\n".join(
        (STATIC / name).read_text(encoding="utf-8") for name in ("explorer_board.js", "explorer_widget.js")
    )
    _css = (STATIC / "explorer.css").read_text(encoding="utf-8")
    images: Any = traitlets.List().tag(sync=True)  # of {"name", "thumb"}
    index = traitlets.Int(0).tag(sync=True)  # written by both sides
    view = traitlets.Dict().tag(sync=True)
    pixel: Any = traitlets.List().tag(sync=True)  # [row, column] or []; written by both sides
    reading = traitlets.Dict().tag(sync=True)
    status = traitlets.Dict().tag(sync=True)  # {"text", "kind"}; kind: "", "busy" or "error"
    opacity = traitlets.Float(0.75).tag(sync=True)
    colormap = traitlets.Unicode(COLOR_MAPS[0]).tag(sync=True)
    luts = traitlets.Dict().tag(sync=True)


class Explorer:
    """Controls and board over a :class:`~smaflib.explorer.state.Gallery`; the last line of a cell shows it.

    Args:
        gallery: images and maps; None: the pretrained networks and images drawn on the spot.
        index: of the image to begin with.

    Attributes:
        exploration: the numbers that are shown at this moment.
        controls: the widgets by name, to be set from code too: ``explorer.controls["bg_score"].value = 0.5``.
    """

    def __init__(self, gallery: Gallery | None = None, index: int = 0) -> None:
        self.board = Board(luts={name: color_table(name) for name in COLOR_MAPS})
        self._panel = widgets.VBox()
        self._panel.add_class("smaf-controls")
        self.widget = widgets.GridBox([self._panel, self.board])
        self.widget.add_class("smaf-explorer")
        self.gallery: Gallery
        self.controls: dict[str, Any]
        self.exploration: Exploration
        self._quiet = False
        self._refining: asyncio.Task[None] | None = None
        self._crf_thread = ThreadPoolExecutor(1, thread_name_prefix="explorer_crf")
        self._use(gallery or Gallery.pretrained(), index)
        self.board.observe(self._heard(lambda change: self._go(change["new"])), "index")
        self.board.observe(self._heard(lambda change: self._read_pixel()), "pixel")

    def _use(self, gallery: Gallery, index: int, remark: str = "") -> None:
        """Show a gallery, with controls of its own: another has other classes and scales."""
        self.gallery, self.controls = gallery, _make_controls(gallery)
        self._fused: tuple[Any, Fused] | None = None
        self._curve: tuple[Any, Curve | None] | None = None
        self._show_images()
        self._open(index)
        self._connect()
        self._draw(remark)
        self._panel.children = _arrange(self.controls, gallery)

    @classmethod
    def from_run(cls, run: Run | str | Path, num_images: int = 8) -> Explorer:
        """The explorer of a run, by name or folder: its first images, its maps and networks.

        Raises:
            RunError: if it is no run, or has no attention maps yet.
        """
        return cls(Gallery.of_run(run, num_images))

    def _repr_mimebundle_(self, **options: Any) -> Any:
        return self.widget._repr_mimebundle_(**options)

    @property
    def role(self) -> Role:
        """Whose maps are shown."""
        role: Role = self.controls["role"].value
        return role

    @property
    def settings(self) -> Settings:
        """What the controls say."""
        value = {name: control.value for name, control in self.controls.items() if hasattr(control, "value")}
        numbers = range(len(self.gallery.scales))
        return Settings(
            class_number=value["class_number"],
            image_label=tuple(sorted(value["image_label"])),
            weights=tuple(value[f"weight_{i}"] if value[f"scale_{i}"] else 0.0 for i in numbers),
            fusion=value["fusion"],
            bg_score=value["bg_score"],
            denoise=value["denoise"],
            reactivate=value["reactivate"],
            crf=self._crf() if value["crf"] else None,
        )

    def _crf(self) -> CrfConfig:
        known = self.gallery.config.pseudo_masks.crf
        return known.model_copy(update={name: self.controls[name].value for name in CRF_RANGES})

    # ------------------------------------------------------------------------------------------------------ the reader

    def _connect(self) -> None:
        # No throttle of our own: a slider in motion sends its next value when the kernel is done with the last one.
        controls, board = self.controls, self.board
        computed = ["class_number", "image_label", "role", "flip", "fusion", "bg_score", "denoise", "reactivate", "crf"]
        computed += [f"{what}_{i}" for i in range(len(self.gallery.scales)) for what in ("scale", "weight")]
        for name in [*computed, *CRF_RANGES]:
            controls[name].observe(self._heard(lambda change: None if _is_rounding(change) else self._draw()), "value")
        for name in ("opacity", "colormap"):  # appearance, not numbers: the board draws what it has once more
            traitlets.dlink((controls[name], "value"), (board, name))
        controls["previous"].on_click(self._heard(lambda button: self._go(board.index - 1)))
        controls["next"].on_click(self._heard(lambda button: self._go(board.index + 1)))
        controls["reset"].on_click(self._heard(lambda button: self._reset()))
        controls["upload"].observe(self._heard(lambda change: self._take_photo(change["new"])), "value")

    def _heard(self, handler: Callable[[Any], None]) -> Callable[[Any], None]:
        """A handler whose errors the reader sees: those of a callback end in a log that nobody reads."""

        def handle(event: Any) -> None:
            if self._quiet:
                return
            try:
                handler(event)
            except (InputError, ValueError) as error:
                self._log(str(error), "error")
            except Exception as error:
                self._log(f"{type(error).__name__}: {error}", "error")
                raise

        return handle

    @contextlib.contextmanager
    def _all_at_once(self) -> Iterator[None]:
        """Set several controls without a redraw for each."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    def _log(self, text: str = "", kind: str = "") -> None:
        self.board.status = {"text": text, "kind": kind}

    def _go(self, index: int, remark: str = "") -> None:
        index = min(max(index, 0), len(self.gallery.samples) - 1)
        self._open(index)
        self._draw(remark)

    def _reset(self) -> None:
        with self._all_at_once():
            for name, value in _first_values(self.gallery).items():
                self.controls[name].value = value
        self._open(self.board.index, keep_class=False)
        self._draw()

    def _take_photo(self, uploads: Sequence[Any]) -> None:
        if not uploads:
            return
        with self._all_at_once():
            self.controls["upload"].value = ()  # so that the same file can be given again
        upload = uploads[0]
        gallery = self.gallery.for_photos()
        classes = gallery.class_names
        index = gallery.add_photo(str(upload["name"]), bytes(upload["content"]))
        label = ", ".join(gallery.class_names[number] for number in gallery.first_settings(index).image_label)
        remark = f"{upload['name']}: the network predicts {label}; correct the image label if it is wrong."
        if gallery is self.gallery and classes == gallery.class_names:
            self._show_images()
            self._go(index, remark)
        else:
            self._use(gallery, index, remark)

    # ------------------------------------------------------------------------------------------------------ the picture

    def _show_images(self) -> None:
        samples = self.gallery.samples
        self.board.images = [
            {"name": sample.image_id, "thumb": picture_address(sample.image, THUMBNAIL_SIDE)} for sample in samples
        ]

    def _open(self, index: int, keep_class: bool = True) -> None:
        """Go to an image: its label, a class that it shows, no pixel."""
        first, controls = self.gallery.first_settings(index), self.controls
        with self._all_at_once():
            self.board.index = index
            self.board.pixel, self.board.reading = [], {}
            controls["image_label"].value = first.image_label
            if not (keep_class and controls["class_number"].value in first.image_label):
                controls["class_number"].value = first.class_number
            flips = self.gallery.flips(index, self.role)
            controls["flip"].disabled = len(flips) < 2
            if flips and controls["flip"].value not in flips:
                controls["flip"].value = flips[0]

    def _draw(self, remark: str = "") -> None:
        """Show what the controls say; the CRF, which takes longer, follows when nothing moves any more.

        Args:
            remark: stands below the picture once all is drawn, until something moves.
        """
        if self._refining is not None:
            self._refining.cancel()
            self._refining = None
        settings = self.settings
        sample = self.gallery.samples[self.board.index]
        plain = replace(settings, crf=None)
        fused = self._fused_now(plain)
        self._show(with_mask(sample, fused, self.gallery.scales, plain), settings)
        if settings.crf is None:
            self._log(remark)
            return
        self._log("refining the mask with the CRF ...", "busy")

        def refine() -> Exploration:
            return with_mask(sample, fused, self.gallery.scales, settings)

        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # no kernel: a script or a test
            self._show(refine(), settings)
            self._log(remark)
        else:
            self._refining = loop.create_task(self._refine_later(refine, settings, remark))

    async def _refine_later(self, refine: Callable[[], Exploration], settings: Settings, remark: str) -> None:
        await asyncio.sleep(REST_SECONDS)
        try:
            result = await asyncio.get_running_loop().run_in_executor(self._crf_thread, refine)
        except Exception as error:
            self._log(f"the CRF failed: {error}", "error")
            raise
        self._show(result, settings)
        self._log(remark)

    def _fused_now(self, settings: Settings) -> Fused:
        """The fused maps, kept while only the background score, reactivation or the CRF change."""
        index, role, flip = self.board.index, self.role, self.controls["flip"].value
        kept = replace(settings, bg_score=1.0, reactivate=True)
        key = (index, role, flip, kept)
        if self._fused is None or self._fused[0] != key:
            cams = self.gallery.cams(index, role, flip)
            fused = fused_under(self.gallery.samples[index], cams, self.gallery.scales, settings)
            self._fused = (key, fused)
        return self._fused[1]

    @property
    def curve(self) -> Curve | None:
        """IoU over the background score of what is shown; kept as long as the fused maps are."""
        key = None if self._fused is None else self._fused[0]
        if self._curve is None or self._curve[0] != key:
            self._curve = (key, iou_curve(self.exploration))
        return self._curve[1]

    def _show(self, result: Exploration, settings: Settings) -> None:
        self.exploration = result
        sample = self.gallery.samples[self.board.index]
        class_names = self.gallery.class_names
        self.board.view = {
            "size": [*result.mask.shape],
            "image": sample.image.permute(1, 2, 0).contiguous().numpy().tobytes(),
            "truth": None if result.ground_truth is None else to_bytes(result.ground_truth),
            "panels": _panels(result, settings),
            "class_names": list(class_names),
            "colors": class_colors(len(class_names)),
            "iou": _iou_rows(result),
            "curve": self.curve and _curve_lines(self.curve, result, settings, class_names),
        }
        self._read_pixel()

    def _read_pixel(self) -> None:
        if not self.board.pixel:
            self.board.reading = {}
            return
        row, col = self.board.pixel
        self.board.reading = _reading(self.exploration.read(row, col), row, col, self.exploration, self.gallery)


def _is_rounding(change: Any) -> bool:
    """Whether a value is another in its last bits only: a browser rounds a slider's to steps when it first shows it."""
    both = change["old"], change["new"]
    return all(isinstance(value, float) for value in both) and math.isclose(*both)


# ------------------------------------------------------------------------------------------------- what the board draws


def _panels(result: Exploration, settings: Settings) -> list[dict[str, Any]]:
    """Image, scales, fused, target, mask: their titles and a byte per pixel."""
    panels: list[dict[str, Any]] = [{"key": "image", "title": "image", "kind": "image", "data": b""}]
    if result.ground_truth is not None:
        panels[0]["note"] = "+ ground truth"
    for scale, weight, cam in zip(result.scales, settings.weights, result.scale_maps, strict=True):
        note = "off" if not weight else "" if weight == 1 else f"x {weight:g}"
        key = f"scale {scale:g}"
        panels.append({"key": key, "title": key, "note": note, "off": not weight, "kind": "map", "data": to_bytes(cam)})
    notes = {
        "fused": rule_title(settings.fusion) + ("" if settings.denoise else ", not denoised"),
        "target": "reactivated" if settings.reactivate else "not reactivated",
        "mask": "before the CRF"
        if result.settings.crf is None and settings.crf
        else "CRF"
        if settings.crf
        else "no CRF",
    }
    for key, values in (("fused", result.fused), ("target", result.target), ("mask", result.mask)):
        kind = "labels" if key == "mask" else "map"
        panels.append({"key": key, "title": key, "note": notes[key], "kind": kind, "data": to_bytes(values)})
    return panels


def _iou_rows(result: Exploration) -> dict[str, Any] | None:
    """IoU of the labels that have one, as (label, IoU)."""
    if result.iou is None:
        return None
    rows = [[label, value] for label, value in enumerate(result.iou.tolist()) if not math.isnan(value)]
    return {"rows": rows, "mean": result.miou}


def _curve_lines(curve: Curve, result: Exploration, settings: Settings, class_names: Sequence[str]) -> dict[str, Any]:
    iou = result.iou_before_crf
    assert iou is not None  # there is no curve without ground truth
    here = [float(iou[settings.class_number + 1]), mean_over_classes(iou)]

    def plain(values: Sequence[float]) -> list[float | None]:
        return [None if math.isnan(value) else value for value in values]  # NaN is not JSON

    return {
        "scores": list(curve.scores),
        "shown": plain(curve.shown),
        "mean": plain(curve.mean),
        "at": [settings.bg_score, *plain(here)],
        "class_name": class_names[settings.class_number],
        "note": "before the CRF" if settings.crf else "",
    }


def _reading(reading: Reading, row: int, col: int, result: Exploration, gallery: Gallery) -> dict[str, Any]:
    weights = [*result.settings.weights, 1, 1]
    return {
        "row": row,
        "col": col,
        "values": [[name, value, not on] for (name, value), on in zip(reading.values.items(), weights, strict=True)],
        "label": reading.label,
        "truth": reading.ground_truth,
        "class_name": gallery.class_names[result.settings.class_number],
    }


# -------------------------------------------------------------------------------------------------------- the controls

_WIDE = widgets.Layout(width="310px")
_LABELS = {"description_width": "104px"}


def _first_values(gallery: Gallery) -> dict[str, Any]:
    """What each control begins with, but for those that depend on the image."""
    first, crf = gallery.first_settings(0), gallery.config.pseudo_masks.crf
    values: dict[str, Any] = {"role": gallery.roles[0], "flip": gallery.config.attention.flip, "fusion": first.fusion}
    values |= {"bg_score": first.bg_score, "denoise": True, "reactivate": True, "crf": False}
    values |= {f"scale_{i}": True for i in range(len(gallery.scales))}
    values |= {f"weight_{i}": 1.0 for i in range(len(gallery.scales))}
    values |= {name: getattr(crf, name) for name in CRF_RANGES}
    return values | {"opacity": 0.75, "colormap": COLOR_MAPS[0]}


def _make_controls(gallery: Gallery) -> dict[str, Any]:
    """All controls by name, with the run's settings."""
    first, names = _first_values(gallery), gallery.class_names
    classes = [(name, number) for number, name in enumerate(names)]

    def slider(name: str, text: str, least: float, most: float, step: float, **more: Any) -> Any:
        kind = widgets.IntSlider if isinstance(first[name], int) else widgets.FloatSlider
        # A run's own setting must stay what it is, even where it lies beyond the usual.
        bounds = {"min": min(least, first[name]), "max": max(most, first[name]), "step": step}
        return kind(first[name], description=text, style=_LABELS, layout=_WIDE, **bounds, **more)

    def box(name: str, text: str) -> Any:
        return widgets.Checkbox(first[name], description=text, indent=False, layout=widgets.Layout(width="98px"))

    def menu(name: str, text: str, options: Sequence[Any]) -> Any:
        return widgets.Dropdown(options=options, value=first[name], description=text, style=_LABELS, layout=_WIDE)

    roles = [(ROLE_NAMES[role], role) for role in gallery.roles]
    half = widgets.Layout(width="98px")
    controls: dict[str, Any] = {
        "previous": widgets.Button(description="◀ previous", tooltip="previous image (Page Up)", layout=half),
        "next": widgets.Button(description="next ▶", tooltip="next image (Page Down)", layout=half),
        "reset": widgets.Button(description="reset", tooltip="the settings to begin with", layout=half),
        "class_number": widgets.Dropdown(options=classes, description="class", style=_LABELS, layout=_WIDE),
        "image_label": widgets.SelectMultiple(
            options=classes, description="image label", rows=min(6, len(classes)), style=_LABELS, layout=_WIDE
        ),
        "role": menu("role", "stage", roles),
        "flip": box("flip", "flip"),
        "fusion": menu("fusion", "fusion rule", [(rule_title(rule), rule) for rule in fusion_rules(first["fusion"])]),
        "bg_score": slider("bg_score", "background", 0.01, 0.98, 0.01),
        "denoise": box("denoise", "denoise"),
        "reactivate": box("reactivate", "reactivate"),
        "crf": box("crf", "CRF"),
        "opacity": slider("opacity", "opacity", 0.0, 1.0, 0.05),
        "colormap": menu("colormap", "colour map", COLOR_MAPS),
        "upload": widgets.FileUpload(
            accept="image/*", description="custom image", multiple=False, layout=widgets.Layout(width="200px")
        ),
    }
    for i, scale in enumerate(gallery.scales):
        controls[f"scale_{i}"] = box(f"scale_{i}", f"scale {scale:g}")
        weight = slider(f"weight_{i}", "", 0.0, 2.0, 0.1, readout_format=".1f")
        weight.layout, weight.tooltip = widgets.Layout(width="206px"), f"weight of scale {scale:g}"
        controls[f"weight_{i}"] = weight
    for name, (gloss, *bounds) in CRF_RANGES.items():
        controls[name] = slider(name, name, *bounds, continuous_update=False, tooltip=gloss)
        controls[name].layout = widgets.Layout(width="294px")  # as wide as the folded box
        controls[name].style = {"description_width": "112px"}
    return controls


def _arrange(controls: dict[str, Any], gallery: Gallery) -> list[Any]:
    """The controls in the order of the method, from the image to its appearance."""

    def row(*names: str) -> Any:
        return widgets.HBox([controls[name] for name in names])

    def head(text: str) -> Any:
        return widgets.HTML(f"<h3>{text}</h3>")

    crf = widgets.Accordion([widgets.VBox([controls[name] for name in CRF_RANGES])], titles=("CRF settings",))
    parts = [row("previous", "next", "reset"), controls["class_number"], controls["role"], head("scales and weights")]
    parts += [row(f"scale_{i}", f"weight_{i}") for i in range(len(gallery.scales))]
    parts += [controls["fusion"], controls["bg_score"], row("flip", "denoise", "reactivate"), row("crf"), crf]
    return [*parts, controls["opacity"], controls["colormap"], controls["image_label"], controls["upload"]]
