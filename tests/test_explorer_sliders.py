"""Sliders of one step, without a browser: every control reaches the picture, and nobody's sliders stay behind."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nbformat
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from smaflib.cams import fuse_cams, multi_scale_cams
from smaflib.config import CrfConfig
from smaflib.data import Samples, load_samples, make_data
from smaflib.explorer import sliders as sliders_module
from smaflib.explorer.sliders import CRF_RANGES, Knob, Sliders, crf_sliders, row_sliders, scale_sliders
from smaflib.files import PROJECT_ROOT
from smaflib.maps import AttentionMaps
from smaflib.models.pretrained import pretrained_network, short_config
from smaflib.pseudo_masks import pseudo_mask
from smaflib.reactivation import denoise
from smaflib.runtime import PROGRESS_FILE

BG_SCORE = 0.35
WIDGET = "application/vnd.jupyter.widget-view+json"


@dataclass(frozen=True)
class Drawn:
    """A few drawn images and the maps of the pretrained teacher."""

    samples: Samples
    maps: AttentionMaps

    def fused(self, index: int) -> Tensor:
        cams, size = self.maps.read(self.samples.image_ids[index])
        return fuse_cams(cams, size, "sum")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    folder = tmp_path_factory.mktemp("drawn")
    config = short_config(folder / "data")
    config = config.model_copy(update={"data": config.data.model_copy(update={"num_train": 3, "num_val": 1})})
    make_data(config, folder)
    samples, maps = load_samples(config, "train").with_masks(), AttentionMaps(folder / "cams", config.attention.scales)
    teacher = pretrained_network("teacher")
    for sample in samples:
        cams = multi_scale_cams(teacher, sample.image, maps.scales)
        maps.write(sample.image_id, cams, (sample.image.shape[-2], sample.image.shape[-1]))
    return Drawn(samples, maps)


def make(drawn: Drawn) -> dict[str, Sliders]:
    sample, names, config = drawn.samples[0], drawn.samples.class_names, short_config(Path())
    denoised = denoise(drawn.fused(0), sample.image_label)
    return {
        "scales": scale_sliders(drawn.samples, drawn.maps, BG_SCORE),
        "row": row_sliders(sample, drawn.fused(0), BG_SCORE, names),
        "crf": crf_sliders(sample, denoised, BG_SCORE, config.pseudo_masks, names),
    }


MOVES = {
    "scales": {
        "image": 1,
        "fusion": "max",
        **{f"weight of scale {scale}": 0.0 for scale in ("0.5", "1", "1.5", "2")},
    },
    "row": {"bg_score": 0.6, "row": 3},
    "crf": {
        "iterations": 0,
        "gt_prob": 0.3,
        "gaussian_sxy": 12.0,
        "gaussian_compat": 20.0,
        "bilateral_sxy": 10.0,
        "bilateral_srgb": 40.0,
        "bilateral_compat": 0.0,
    },
}


@pytest.mark.parametrize("which", MOVES)
def test_every_control_changes_the_picture_and_moves_it_back(drawn: Drawn, which: str) -> None:
    sliders = make(drawn)[which]
    assert list(MOVES[which]) == list(sliders.controls)
    for name, value in MOVES[which].items():
        control, before, picture = sliders.controls[name], sliders.controls[name].value, sliders.picture.value
        control.value = value
        assert sliders.picture.value != picture, name
        control.value = before
        assert sliders.picture.value == picture, name


def test_crf_controls_bear_the_names_of_the_config_and_begin_with_its_values(drawn: Drawn) -> None:
    own = CrfConfig(gaussian_sxy=35.5, iterations=2)  # beyond the slider's usual range
    config = short_config(Path()).pseudo_masks.model_copy(update={"crf": own})
    sample = drawn.samples[0]
    sliders = crf_sliders(sample, denoise(drawn.fused(0), sample.image_label), BG_SCORE, config, ("a",) * 6)
    assert set(CRF_RANGES) <= set(CrfConfig.model_fields)
    assert {name: control.value for name, control in sliders.controls.items()} == {
        name: getattr(own, name) for name in CRF_RANGES
    }


def test_captions_are_the_scores_of_the_librarys_masks(drawn: Drawn, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = []
    monkeypatch.setattr(sliders_module, "image_score", lambda mask, truth, num: scored.append(mask) or 0.5)
    sliders = make(drawn)["crf"]
    sliders.controls["gt_prob"].value = 0.5
    sample, config = drawn.samples[0], short_config(Path()).pseudo_masks
    crf = config.crf.model_copy(update={"gt_prob": 0.5})
    denoised = denoise(drawn.fused(0), sample.image_label)
    with_crf = config.model_copy(update={"refine": "crf", "crf": crf})
    assert scored[-1].tolist() == pseudo_mask(sample.image, denoised, BG_SCORE, with_crf).tolist()


def test_without_any_scale_the_reader_is_told_and_the_picture_stays(drawn: Drawn) -> None:
    sliders = make(drawn)["scales"]
    weights = [control for name, control in sliders.controls.items() if name.startswith("weight")]
    for control in weights[:-1]:
        control.value = 0.0
    picture = sliders.picture.value
    weights[-1].value = 0.0
    assert sliders.picture.value == picture and "give one of them more" in sliders.trouble.value
    weights[0].value = 1.0
    assert sliders.picture.value != picture and not sliders.trouble.value


def test_a_run_keeps_the_picture_alone_and_a_reader_gets_the_sliders(
    drawn: Drawn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sliders = make(drawn)["row"]
    monkeypatch.delenv(PROGRESS_FILE, raising=False)
    shown = sliders._repr_mimebundle_()
    assert WIDGET in shown and base64.b64decode(shown["image/png"]) == sliders.picture.value
    monkeypatch.setenv(PROGRESS_FILE, str(tmp_path / "progress"))
    monkeypatch.setattr(sliders_module, "widgets", None)  # none is made: its state would stay in the notebook
    for alone in make(drawn).values():
        assert set(alone._repr_mimebundle_()) == {"image/png", "text/plain"}


def test_the_picture_is_the_whole_figure() -> None:
    def draw(part: float) -> Figure:
        figure = Figure(figsize=(1, 2))
        figure.add_axes((0, 0, 1, part)).set_facecolor("black")
        return figure

    sliders = Sliders(draw, {"part": Knob(0.5)})
    with Image.open(sliders_module.io.BytesIO(sliders.picture.value)) as picture:
        assert picture.size == (sliders_module.DPI, 2 * sliders_module.DPI)
        assert np.asarray(picture.convert("L")).mean() == pytest.approx(255 / 2, abs=8)


@pytest.mark.parametrize(
    ("notebook", "call"),
    {"03": scale_sliders, "04": row_sliders, "06": crf_sliders}.items(),
    ids=lambda each: getattr(each, "__name__", each),
)
def test_notebooks_show_their_sliders_last_in_a_cell_of_few_lines(notebook: str, call: Callable[..., Sliders]) -> None:
    (path,) = (PROJECT_ROOT / "notebooks").glob(f"{notebook}_*.ipynb")
    cells = [cell.source.splitlines() for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    (lines,) = [lines for lines in cells if any(f"{call.__name__}(" in line for line in lines)]
    assert lines[-1].startswith(f"{call.__name__}(") and len(lines) <= 4
