"""The explorer's controls, without a browser: what they say reaches the numbers, and errors reach the reader."""

from __future__ import annotations

import asyncio
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from smaflib.cams import fuse_cams
from smaflib.config import CrfConfig
from smaflib.explorer import widget as explorer_module
from smaflib.explorer.state import Gallery
from smaflib.explorer.widget import Explorer


@pytest.fixture(scope="module")
def pretrained() -> Gallery:
    return Gallery.pretrained(3)


@pytest.fixture
def explorer(pretrained: Gallery) -> Explorer:
    # Maps once for all tests; each has a list of images of its own to add to.
    return Explorer(replace(pretrained, samples=list(pretrained.samples), _cams=dict(pretrained._cams)), index=2)


def expected(explorer: Explorer) -> torch.Tensor:
    flip = explorer.controls["flip"].value
    return explorer.gallery.explore(explorer.board.index, explorer.role, explorer.settings, flip).mask


def test_it_begins_with_the_runs_settings(explorer: Explorer) -> None:
    assert explorer.settings == explorer.gallery.first_settings(2)
    assert explorer.board.index == 2 and len(explorer.board.images) == 3
    assert torch.equal(explorer.exploration.mask, expected(explorer))
    panels = explorer.board.view["panels"]
    keys = ["image", "scale 0.5", "scale 1", "scale 1.5", "scale 2", "fused", "target", "mask"]
    assert [panel["key"] for panel in panels] == keys
    assert panels[-1]["data"] == explorer.exploration.mask.numpy().tobytes()
    assert len(panels[1]["data"]) == 128 * 128


@pytest.mark.parametrize(
    ("name", "value", "setting"),
    [
        ("bg_score", 0.6, {"bg_score": 0.6}),
        ("fusion", "max", {"fusion": "max"}),
        ("scale_1", False, {"weights": (1.0, 0.0, 1.0, 1.0)}),
        ("weight_3", 0.3, {"weights": (1.0, 1.0, 1.0, 0.3)}),
        ("denoise", False, {"denoise": False}),
        ("reactivate", False, {"reactivate": False}),
        ("class_number", 4, {"class_number": 4}),
        ("image_label", (0, 5), {"image_label": (0, 5)}),
        ("flip", False, {}),
        ("role", "student", {}),
        (
            "crf",
            True,
            {"crf": CrfConfig(iterations=5, gaussian_sxy=1.5, bilateral_sxy=20, bilateral_srgb=8, bilateral_compat=6)},
        ),
    ],
)
def test_every_control_reaches_the_numbers(explorer: Explorer, name: str, value: object, setting: dict) -> None:
    before, view = explorer.settings, explorer.board.view
    explorer.controls[name].value = value
    assert explorer.settings == replace(before, **setting)
    assert explorer.exploration.settings == explorer.settings
    assert torch.equal(explorer.exploration.mask, expected(explorer))
    assert explorer.board.view != view and explorer.board.status["kind"] == ""


def test_iou_and_curve_on_the_board_are_those_of_the_exploration(explorer: Explorer) -> None:
    iou = explorer.exploration.iou
    assert iou is not None
    known = [[label, value] for label, value in enumerate(iou.tolist()) if value == value]
    assert explorer.board.view["iou"] == {"rows": known, "mean": explorer.exploration.miou}
    assert [label for label, _ in known] == [0, 1, 3]  # background, llama, crane
    curve = explorer.board.view["curve"]
    assert curve["at"] == [explorer.settings.bg_score, iou[1].item(), explorer.exploration.miou]
    explorer.controls["class_number"].value = 5  # neither in the ground truth nor in the mask: nothing, not NaN
    assert explorer.board.view["curve"]["at"][1] is None


def test_pixel_is_read_again_when_the_settings_change(explorer: Explorer) -> None:
    explorer.board.pixel = [80, 60]
    first = explorer.exploration.read(80, 60)
    assert explorer.board.reading["values"] == [[name, value, False] for name, value in first.values.items()]
    explorer.controls["weight_0"].value = 0.0
    assert explorer.board.reading["values"][0] == ["scale 0.5", first.values["scale 0.5"], True]
    assert explorer.board.reading["values"][4][1] == explorer.exploration.read(80, 60).values["fused"]
    explorer.board.pixel = []
    assert explorer.board.reading == {}


def test_other_image_has_its_own_label_and_keeps_the_class_it_can(explorer: Explorer) -> None:
    explorer.board.pixel = [80, 60]
    explorer.controls["class_number"].value = 2  # crane, which image 1 shows too
    explorer.controls["previous"].click()
    assert explorer.board.index == 1 and explorer.settings.image_label == (2, 5) and explorer.settings.class_number == 2
    assert explorer.board.pixel == []
    explorer.board.index = 0  # as a click on a thumbnail does
    assert explorer.settings.image_label == (5,) and explorer.settings.class_number == 5
    explorer.controls["previous"].click()
    assert explorer.board.index == 0  # there is none before
    for _ in range(5):
        explorer.controls["next"].click()
    assert explorer.board.index == 2


def test_reset_gives_the_first_settings_back(explorer: Explorer) -> None:
    first = explorer.settings
    changes = {"bg_score": 0.9, "scale_0": False, "weight_1": 0.2, "fusion": "max", "iterations": 1, "opacity": 0.1}
    for name, value in (changes | {"image_label": (), "class_number": 5, "role": "student"}).items():
        explorer.controls[name].value = value
    explorer.controls["reset"].click()
    assert explorer.settings == first and explorer.role == "teacher"
    assert explorer.controls["iterations"].value == 5 and explorer.board.opacity == 0.75


def test_appearance_goes_to_the_board_and_changes_no_number(explorer: Explorer) -> None:
    view = explorer.board.view
    explorer.controls["opacity"].value = 0.4
    explorer.controls["colormap"].value = "cividis"
    assert (explorer.board.opacity, explorer.board.colormap) == (0.4, "cividis")
    assert explorer.board.view is view


def test_no_scale_at_all_is_said_and_the_picture_stays(explorer: Explorer) -> None:
    for number in range(4):
        explorer.controls[f"scale_{number}"].value = False
    assert explorer.board.status["kind"] == "error" and "switch at least one on" in explorer.board.status["text"]
    assert explorer.exploration.settings.weights == (0.0, 0.0, 0.0, 1.0)
    explorer.controls["scale_3"].value = True
    assert explorer.board.status["text"] == ""


def test_error_of_the_library_is_said(explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(explorer_module, "fused_under", fail)
    with pytest.raises(RuntimeError):
        explorer.controls["denoise"].value = False
    assert explorer.board.status == {"text": "RuntimeError: out of memory", "kind": "error"}


def upload(name: str, content: bytes) -> tuple[dict, ...]:
    return (
        {"name": name, "type": "image/png", "size": len(content), "content": memoryview(content), "last_modified": 0},
    )


def give(explorer: Explorer, name: str, content: bytes) -> None:
    explorer._take_photo(upload(name, content))


def test_photo_comes_without_ground_truth_and_with_a_label_that_can_be_corrected(explorer: Explorer) -> None:
    content = io.BytesIO()
    Image.fromarray(explorer.gallery.samples[0].image.permute(1, 2, 0).numpy()).save(content, "PNG")
    explorer.gallery.knows_photos = True  # as that of a run on photos
    give(explorer, "mine.png", content.getvalue())
    assert explorer.board.index == 3 and len(explorer.board.images) == 4
    assert explorer.board.view["iou"] is None and explorer.board.view["curve"] is None
    assert "mine.png: the network predicts" in explorer.board.status["text"]
    explorer.controls["image_label"].value = (1,)
    assert set(explorer.exploration.mask.unique().tolist()) <= {0, 2}


def test_what_the_network_predicts_is_still_there_when_the_crf_is_done(explorer: Explorer) -> None:
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(content, "PNG")

    async def hand_over() -> None:  # as in a kernel, where the CRF comes later
        give(explorer, "first.png", content.getvalue())
        explorer.controls["crf"].value = True
        give(explorer, "second.png", content.getvalue())
        assert "refining" in explorer.board.status["text"] and explorer._refining is not None
        await explorer._refining
        assert explorer.board.status["text"].startswith("second.png: the network predicts")
        explorer.controls["bg_score"].value = 0.7
        assert explorer._refining is not None
        await explorer._refining
        assert not explorer.board.status["text"]  # something has moved

    asyncio.run(hand_over())


def test_networks_of_drawings_leave_a_photo_to_imagenets(explorer: Explorer) -> None:
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(content, "PNG")
    panel, children = explorer._panel, explorer._panel.children
    give(explorer, "first.png", content.getvalue())
    assert explorer.board.index == 0 and len(explorer.board.images) == 1
    assert len(explorer.board.view["class_names"]) == 5 and len(explorer.settings.weights) == 4
    assert "first.png: the network predicts" in explorer.board.status["text"]
    score = explorer.controls["bg_score"]
    score.value = np.nextafter(score.value, 1)  # as a browser rounds it when it shows the slider
    assert "first.png: the network predicts" in explorer.board.status["text"]
    assert explorer._panel is panel and explorer._panel.children != children
    give(explorer, "second.png", content.getvalue())  # the same gallery takes it
    assert explorer.board.index == 1 and len(explorer.board.images) == 2
    explorer.controls["previous"].click()
    assert explorer.board.index == 0
    explorer.controls["bg_score"].value = 0.7
    assert explorer.exploration.settings.bg_score == 0.7


def test_photo_is_refused_where_imagenets_weights_are_missing(
    explorer: Explorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smaflib.models.weights.importlib.util.find_spec", lambda name: None)
    before = explorer.board.view
    explorer._heard(lambda change: explorer._take_photo(change["new"]))({"new": upload("a.png", b"any")})
    assert explorer.board.status["kind"] == "error" and "pip install" in explorer.board.status["text"]
    assert explorer.board.view is before and len(explorer.board.images) == 3


def test_file_that_is_no_picture_breaks_nothing(explorer: Explorer) -> None:
    handler = explorer._heard(lambda change: explorer._take_photo(change["new"]))
    handler({"new": upload("letter.jpg", b"dear sir")})
    assert explorer.board.status["kind"] == "error" and "letter.jpg cannot be read" in explorer.board.status["text"]
    assert explorer.board.index == 2 and len(explorer.board.images) == 3
    explorer.controls["bg_score"].value = 0.5
    assert explorer.board.status["text"] == "" and explorer.exploration.settings.bg_score == 0.5


def test_in_a_kernel_the_crf_waits_for_rest_and_runs_once(explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explorer_module, "REST_SECONDS", 0.05)
    refined = []
    with_mask = explorer_module.with_mask

    def counted(sample, fused, scales, settings):  # type: ignore[no-untyped-def]
        refined.extend([settings.bg_score] if settings.crf else [])
        return with_mask(sample, fused, scales, settings)

    monkeypatch.setattr(explorer_module, "with_mask", counted)

    async def drag() -> None:
        explorer.controls["crf"].value = True
        for step in range(5):
            explorer.controls["bg_score"].value = 0.40 + 0.01 * step
            assert explorer.board.status["kind"] == "busy" and "refining" in explorer.board.status["text"]
            assert explorer.exploration.settings.crf is None  # meanwhile the mask before the CRF
            await asyncio.sleep(0.01)
        assert explorer._refining is not None
        await explorer._refining

    asyncio.run(drag())
    assert refined == [pytest.approx(0.44)]
    assert explorer.exploration.settings == explorer.settings and explorer.settings.crf is not None
    assert explorer.board.status["kind"] == "" and torch.equal(explorer.exploration.mask, expected(explorer))


def test_gallery_without_a_network_of_a_role_offers_what_there_is() -> None:
    gallery = Gallery.pretrained(1)
    del gallery.networks["student"]
    explorer = Explorer(gallery)
    assert explorer.controls["role"].options == (("classifier (teacher)", "teacher"),)


def test_it_shows_itself_as_a_widget(explorer: Explorer) -> None:
    bundle = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle


def test_settings_beyond_the_usual_range_stay_what_they_are() -> None:
    gallery = Gallery.pretrained(1)
    crf = gallery.config.pseudo_masks.crf.model_copy(update={"bilateral_sxy": 250.0, "iterations": 40})
    masks = gallery.config.pseudo_masks.model_copy(update={"crf": crf})
    gallery.config = gallery.config.model_copy(update={"pseudo_masks": masks})
    explorer = Explorer(gallery)
    explorer.controls["crf"].value = True
    assert explorer.settings.crf == crf


def test_numbers_of_the_view_are_json(explorer: Explorer) -> None:
    explorer.controls["class_number"].value = 5

    def check(value: object) -> None:
        if isinstance(value, dict):
            assert all(isinstance(key, str) for key in value)
            value = list(value.values())
        if isinstance(value, (list, tuple)):
            for item in value:
                check(item)
        elif isinstance(value, float):
            assert np.isfinite(value)

    check(explorer.board.view)


def test_a_rule_of_somebodys_own_is_offered_and_its_errors_are_said(
    pretrained: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "def least(maps, scales): return maps.amin(dim=0) - (1 if len(scales) < 3 else 0)\n"
    (tmp_path / "own_widget_rule.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    attention = pretrained.config.attention.model_copy(update={"fusion": "own_widget_rule:least"})
    config = pretrained.config.model_copy(update={"attention": attention})
    explorer = Explorer(replace(pretrained, config=config, _cams=dict(pretrained._cams)))
    assert explorer.controls["fusion"].options[-1] == ("own_widget_rule:least", "own_widget_rule:least")
    by_hand = fuse_cams(
        explorer.gallery.cams(0, "teacher", True), (128, 128), "own_widget_rule:least", (0.5, 1, 1.5, 2)
    )
    shown = explorer.settings.class_number
    assert torch.equal(explorer.exploration.fused, by_hand[shown])
    explorer.controls["fusion"].value = "sum"
    assert not torch.equal(explorer.exploration.fused, by_hand[shown])
    explorer.controls["fusion"].value = "own_widget_rule:least"
    for name in ("scale_0", "scale_1"):
        explorer.controls[name].value = False
    assert explorer.board.status["kind"] == "error"
    assert "the fusion rule own_widget_rule:least returned negative values" in explorer.board.status["text"]
