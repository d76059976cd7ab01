"""The attention explorer for JupyterLab: change any setting between the image and the mask, and see its effect.

``Explorer()`` works right after installation, on photos and on drawn images; ``Explorer.of_photos("my_photos")`` shows
your photos, ``Explorer.from_run("mini")`` the images of a run. Numbers come from :mod:`smaflib.explorer.state`;
``static/explorer_board.js`` draws in the browser, several times as fast as a new figure for each change.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

try:
    import anywidget
    import ipywidgets as widgets
    import traitlets
except ImportError as error:
    raise ImportError(f"the explorer needs {error.name}; install it with: pip install 'smaflib[explorer]'") from error

import numpy as np
from torch import Tensor

from smaflib.cams import fusion_rules
from smaflib.errors import DataError, InputError
from smaflib.explorer import state
from smaflib.explorer.page import STATIC, save_page
from smaflib.explorer.sliders import CRF_RANGES, make_control, slider_options
from smaflib.explorer.state import Exploration, Gallery, PhotoGallery, Settings
from smaflib.report.palette import class_colors
from smaflib.runs import Run
from smaflib.sources.imagenet import synonyms

REST_SECONDS = 0.25  # without a change, then the CRF starts, so that it does not run while a slider is dragged


class Board(anywidget.AnyWidget):
    """The part of the explorer that draws; ``static/explorer_widget.js`` reads and writes its traits."""

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
    lut = traitlets.Bytes(state.COLOR_TABLE).tag(sync=True)


class Explorer(widgets.GridBox):  # type: ignore[misc]
    """Controls and board over galleries, a tab for each; display it as the last line of a cell.

    Without a gallery it shows :meth:`Gallery.photos` and :meth:`Gallery.pretrained`.

    Attributes:
        galleries: what the tabs show; ``gallery`` is the one that is open.
        exploration: the numbers that are shown.
        controls: the widgets by name, which code can set too: ``explorer.controls["bg_score"].value = 0.5``.
    """

    def __init__(self, *galleries: Gallery, index: int = 0) -> None:
        self.galleries = [*galleries] or [Gallery.photos(), Gallery.pretrained()]
        if not self.galleries[0].samples:
            raise DataError('this gallery holds no image yet; name files or a folder: Explorer.of_photos("my_photos")')
        self.board = Board()
        self._panel, self._about = widgets.VBox(), widgets.HTML()
        self._panel.add_class("smaf-controls")
        self.tabs = widgets.ToggleButtons()
        super().__init__([widgets.VBox([self.tabs, self._about]), self._panel, self.board])
        self.add_class("smaf-explorer")
        self._quiet = False
        self._refining: asyncio.Task[None] | None = None
        self._use(self.galleries[0], index)
        self.tabs.observe(self._reporting(lambda change: self._use(self.galleries[change["new"]], 0)), "value")
        self.board.observe(self._reporting(lambda change: self._go(change["new"])), "index")
        self.board.observe(self._reporting(lambda change: self._read_pixel()), "pixel")

    @classmethod
    def of_photos(cls, files: str | Path | Iterable[str | Path] | None = None) -> Explorer:
        """Explorer of files, or of all photos of a folder, beside drawn images; raises as :meth:`Gallery.photos`."""
        return cls(Gallery.photos(files), Gallery.pretrained())

    @classmethod
    def from_run(cls, run: Run | str | Path, num_images: int = 8) -> Explorer:
        """Explorer of a run, by name or folder; raises what :meth:`Gallery.of_run` raises."""
        return cls(Gallery.of_run(run, num_images))

    @property
    def role(self) -> str:
        """Network whose maps are shown."""
        return str(self.controls["role"].value)

    def _values(self) -> dict[str, Any]:
        return {name: control.value for name, control in self.controls.items() if hasattr(control, "value")}

    @property
    def settings(self) -> Settings:
        value, numbers = self._values(), range(len(self.gallery.scales))
        masks = self.gallery.config.pseudo_masks
        crf = masks.crf.model_copy(update={name: value[name] for name in CRF_RANGES})
        return Settings(
            **{name: value[name] for name in ("class_number", "fusion", "bg_score", "denoise", "reactivate")},
            image_label=self.gallery.numbers(self.board.index, value["image_label"]),
            weights=tuple(value[f"weight_{i}"] if value[f"scale_{i}"] else 0.0 for i in numbers),
            crf=crf if value["crf"] else None,
            min_part=masks.min_part,
        )

    def _use(self, gallery: Gallery, index: int, remark: str = "") -> None:
        """Show a gallery, with new controls: another gallery has other classes and scales."""
        self.gallery, self.controls = gallery, _make_controls(gallery)
        self._about.value = html.escape(gallery.about)
        with self._without_redraw():
            self.tabs.options = [(each.title, number) for number, each in enumerate(self.galleries)]
            self.tabs.value = self.galleries.index(gallery)
        of_image = ("class_number", "image_label", "search", "upload")
        self._first = {name: value for name, value in self._values().items() if name not in of_image}
        self._show_images()
        self._open(index)
        self._connect()
        self._draw(remark)
        self._panel.children = _arrange(self.controls, gallery)

    def _connect(self) -> None:
        controls, board = self.controls, self.board
        traitlets.dlink((controls["opacity"], "value"), (board, "opacity"))  # the board redraws what it has
        redraw = self._reporting(lambda change: None if _is_rounding(change) else self._draw())
        for name in self._values().keys() - {"opacity", "search", "upload"}:
            controls[name].observe(redraw, "value")
        controls["previous"].on_click(self._reporting(lambda button: self._go(board.index - 1)))
        controls["next"].on_click(self._reporting(lambda button: self._go(board.index + 1)))
        controls["reset"].on_click(self._reporting(lambda button: self._reset()))
        controls["page"].on_click(self._reporting(lambda button: self._save_page()))
        controls["search"].observe(self._reporting(lambda change: self._search(change["new"])), "value")
        controls["upload"].observe(self._reporting(lambda change: self._add_photo(change["new"])), "value")

    def _reporting(self, handler: Callable[[Any], None]) -> Callable[[Any], None]:
        """A handler whose errors are shown; those of a widget's callback would end in a log."""

        def handle(event: Any) -> None:
            if self._quiet:
                return
            try:
                handler(event)
            except (InputError, ValueError) as error:
                self._say(str(error), "error")
            except Exception as error:
                self._say(f"{type(error).__name__}: {error}", "error")
                raise

        return handle

    @contextlib.contextmanager
    def _without_redraw(self) -> Iterator[None]:
        self._quiet = True
        try:
            yield
        finally:
            self._quiet = False

    def _say(self, text: str = "", kind: str = "") -> None:
        self.board.status = {"text": text, "kind": kind}

    def _go(self, index: int, remark: str = "") -> None:
        self._open(min(max(index, 0), len(self.gallery.samples) - 1))
        self._draw(remark)

    def _open(self, index: int, keep_class: bool = True) -> None:
        """Select an image, its label, a class of it and no pixel."""
        first, controls = self.gallery.first_settings(index), self.controls
        with self._without_redraw():
            self.board.index = index
            self.board.pixel, self.board.reading = [], {}
            names = controls["image_label"].allowed_tags = [*self.gallery.names(index)]
            offered = [(name, number) for number, name in enumerate(names)]
            keep_class = keep_class and list(controls["class_number"].options) == offered
            if not keep_class:
                controls["class_number"].options = offered
            controls["image_label"].value = [names[number] for number in first.image_label]
            if not (keep_class and controls["class_number"].value in first.image_label):
                controls["class_number"].value = first.class_number
            flips = self.gallery.flips(self.role)
            controls["flip"].disabled = len(flips) < 2
            if controls["flip"].value not in flips:
                controls["flip"].value = flips[0]

    def _reset(self) -> None:
        with self._without_redraw():
            for name, value in self._first.items():
                self.controls[name].value = value
        self._open(self.board.index, keep_class=False)
        self._draw()

    def _add_photo(self, uploads: Sequence[Any]) -> None:
        if not uploads:
            return
        with self._without_redraw():
            self.controls["upload"].value = ()  # so that the same file can be chosen again
        upload = uploads[0]
        known = [each for each in (self.gallery, *self.galleries) if each.knows_photos]
        gallery = known[0] if known else Gallery.photos(())
        index = gallery.add_photo(str(upload["name"]), bytes(upload["content"]))
        label, names = gallery.first_settings(index).image_label, gallery.names(index)
        predicted = ", ".join(names[number] for number in label) or "nothing with certainty"
        remark = f"{upload['name']}: the network predicts {predicted}; correct the image label if it is wrong."
        if gallery is self.gallery:
            self._show_images()
            self._go(index, remark)
        else:
            self.galleries = list(dict.fromkeys([*self.galleries, gallery]))
            self._use(gallery, index, remark)

    def _search(self, text: str) -> None:
        """Add a class to the photo's label by name, and show its map."""
        if not text or not isinstance(self.gallery, PhotoGallery):
            return
        label, index = self.controls["image_label"].value, self.board.index
        number = self.gallery.add_class(index, text)
        self._open(index)
        with self._without_redraw():
            self.controls["search"].value = ""
            self.controls["image_label"].value = list(dict.fromkeys([*label, self.gallery.names(index)[number]]))
            self.controls["class_number"].value = number
        self._draw()

    def _save_page(self) -> None:
        self._say("writing the page ...", "busy")
        path = save_page(self.gallery, self.board.index)
        self._say(f"saved {path.resolve()}, which needs a browser only")

    def _show_images(self) -> None:
        samples = self.gallery.samples
        self.board.images = [
            {"name": s.image_id, "thumb": state.data_url(s.image, state.THUMBNAIL_SIDE)} for s in samples
        ]

    def _draw(self, remark: str = "") -> None:
        """Show the controls' settings, then ``remark`` until the next change; the slower CRF follows after a rest."""
        if self._refining is not None:
            self._refining.cancel()
        settings, index, scales = self.settings, self.board.index, self.gallery.scales
        sample, cams = self.gallery.samples[index], self.gallery.cams(index, self.role, self.controls["flip"].value)
        plain = state.explore(sample, cams, scales, replace(settings, crf=None))
        self._show(plain, plain, settings)
        if settings.crf is None:
            self._say(remark)
            return
        self._say("refining the mask with the CRF ...", "busy")

        async def refine() -> None:
            await asyncio.sleep(REST_SECONDS)
            try:
                self._show(await asyncio.to_thread(state.explore, sample, cams, scales, settings), plain, settings)
            except Exception as error:
                self._say(f"the CRF failed: {error}", "error")
                raise
            self._say(remark)

        try:
            self._refining = asyncio.get_running_loop().create_task(refine())
        except RuntimeError:  # a script, without a kernel's event loop
            asyncio.run(refine())

    def _show(self, result: Exploration, plain: Exploration, settings: Settings) -> None:
        """Send a result to the board, with the curve of the mask without the CRF."""
        self.exploration = result
        gallery, curve = self.gallery, None
        if result.ground_truth is not None:
            at, note = [settings.bg_score, _plain(plain.iou)], "before the CRF" if settings.crf else ""
            curve = {"scores": list(state.CURVE_SCORES), "ious": _plain(plain.iou_curve()), "at": at, "note": note}
        index, number = self.board.index, settings.class_number
        image, names = gallery.samples[index].image, list(gallery.names(index))
        self.board.view = {  # documented in static/explorer_board.js, setView
            "size": [*result.mask.shape],
            "image": image.permute(1, 2, 0).contiguous().numpy().tobytes(),
            "truth": None if result.ground_truth is None else state.to_bytes(result.ground_truth),
            "class_names": names,
            "colors": class_colors(len(names)),
            "likeliest": gallery.probabilities(index),
            "class_number": number,
            "erased": settings.denoise and number not in settings.image_label,
            "scales": list(gallery.scales),
            "weights": list(settings.weights),
            "rule": settings.fusion,
            "denoise": settings.denoise,
            "reactivate": settings.reactivate,
            "crf": "no CRF" if settings.crf is None else "CRF" if result.settings.crf else "before the CRF",
            "maps": [state.to_bytes(cam) for cam in result.scale_maps],
            "fused": state.to_bytes(result.fused),
            "target": state.to_bytes(result.target),
            "mask": state.to_bytes(result.mask),
            "iou": _plain(result.iou),
            "curve": curve,
        }
        self._read_pixel()

    def _read_pixel(self) -> None:
        if not self.board.pixel:
            self.board.reading = {}
            return
        (row, col), result = self.board.pixel, self.exploration
        self.board.reading = {
            "row": row,
            "col": col,
            "values": [[name, value] for name, value in result.read(row, col).items()],
            "label": int(result.mask[row, col]),
            "truth": None if result.ground_truth is None else int(result.ground_truth[row, col]),
        }


def _is_rounding(change: Any) -> bool:
    """Whether only the last bits changed: a browser rounds a slider's value when it first shows it."""
    return isinstance(change["new"], float) and math.isclose(change["old"], change["new"])


def _plain(ious: Tensor | None) -> Any:
    """IoUs as nested lists with None for nan, which is not JSON."""
    return None if ious is None else np.where(ious.isnan().numpy(), None, ious.numpy()).tolist()  # type: ignore[call-overload]


def _make_controls(gallery: Gallery) -> dict[str, Any]:
    """All controls by name, with the run's settings."""
    first, crf = gallery.first_settings(0), gallery.config.pseudo_masks.crf
    classes = [(name, number) for number, name in enumerate(gallery.names(0))]
    searched = synonyms() if isinstance(gallery, PhotoGallery) else ()
    roles = [("classifier (teacher)" if role == "teacher" else role, role) for role in gallery.roles]

    def look(text: str, width: int = 310, label: int = 104) -> dict[str, Any]:
        return {"description": text, "layout": {"width": f"{width}px"}, "style": {"description_width": f"{label}px"}}

    def slider(value: float, least: float, most: float, step: float, **options: Any) -> Any:
        return make_control(slider_options(value, least, most, step) | options)

    def box(value: bool, text: str) -> Any:
        return widgets.Checkbox(value, description=text, indent=False, layout={"width": "98px"})

    def button(text: str, tooltip: str) -> Any:
        return widgets.Button(description=text, tooltip=tooltip, layout={"width": "auto"})

    controls: dict[str, Any] = {
        "previous": button("◀ previous", "previous image (Page Up)"),
        "next": button("next ▶", "next image (Page Down)"),
        "reset": button("reset", "back to the first settings"),
        "page": button("save as page", "write these images into a page for any browser, without Python"),
        "search": widgets.Combobox(
            options=searched, placeholder="any of 1000 names", continuous_update=False, **look("search")
        ),
        "class_number": widgets.Dropdown(options=classes, **look("class")),
        "image_label": widgets.TagsInput(allow_duplicates=False, placeholder="add a name", layout={"width": "200px"}),
        "role": widgets.Dropdown(options=roles, **look("stage")),
        "flip": box(gallery.config.attention.flip, "flip"),
        "fusion": widgets.Dropdown(options=fusion_rules(first.fusion), value=first.fusion, **look("fusion rule")),
        "bg_score": slider(first.bg_score, 0.01, 0.98, 0.01, **look("background")),
        "denoise": box(True, "denoise"),
        "reactivate": box(True, "reactivate"),
        "crf": box(False, "CRF"),
        "opacity": slider(0.75, 0.0, 1.0, 0.05, **look("opacity")),
        "upload": widgets.FileUpload(accept="image/*", description="add a photo", layout={"width": "auto"}),
    }
    for i, scale in enumerate(gallery.scales):
        controls[f"scale_{i}"] = box(True, f"scale {scale:g}")
        weight = look("", 206, 0) | {"readout_format": ".1f", "tooltip": f"weight of scale {scale:g}"}
        controls[f"weight_{i}"] = slider(1.0, 0.0, 2.0, 0.1, **weight)
    for name, (tooltip, *bounds) in CRF_RANGES.items():
        inside = look(name, 294, 112) | {"tooltip": tooltip, "continuous_update": False}  # narrower: in a folded box
        controls[name] = slider(getattr(crf, name), *bounds, **inside)
    return controls


def _arrange(controls: dict[str, Any], gallery: Gallery) -> list[Any]:
    """The controls in the order of the method, from the image to its appearance."""

    def row(*names: str) -> Any:
        return widgets.HBox([controls[name] for name in names])

    crf = widgets.Accordion([widgets.VBox([controls[name] for name in CRF_RANGES])], titles=("CRF settings",))
    head = widgets.HTML("<h3>scales and weights</h3>")
    parts = [row("previous", "next", "reset"), row("upload", "page"), controls["class_number"]]
    parts += [controls["search"]] if isinstance(gallery, PhotoGallery) else []
    parts += [widgets.HBox([widgets.Label("image label"), controls["image_label"]]), controls["role"], head]
    parts += [row(f"scale_{i}", f"weight_{i}") for i in range(len(gallery.scales))]
    parts += [controls["fusion"], controls["bg_score"], row("flip", "denoise", "reactivate"), row("crf"), crf]
    return [*parts, controls["opacity"]]
