"""The explorer's controls without a browser: they set the numbers, and errors are shown."""

from __future__ import annotations

import asyncio
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_explorer_page import data_of

from smaflib.errors import DataError
from smaflib.explorer import widget as explorer_module
from smaflib.explorer.state import LIKELIEST_CLASSES, Exploration, Gallery, PhotoGallery
from smaflib.explorer.widget import Explorer


@pytest.fixture
def explorer(pretrained: Gallery) -> Explorer:
    # Each test has its own list of images to add to.
    return Explorer(replace(pretrained, samples=list(pretrained.samples), _cams=dict(pretrained._cams)), index=2)


def expected(explorer: Explorer) -> Exploration:
    flip = explorer.controls["flip"].value
    return explorer.gallery.explore(explorer.board.index, explorer.role, explorer.settings, flip)


def test_every_control_sets_the_numbers_and_reset_undoes_it(explorer: Explorer) -> None:
    before, view = explorer.settings, explorer.board.view
    assert before == explorer.gallery.first_settings(2)
    changes: dict[str, tuple[object, dict]] = {
        "bg_score": (0.6, {"bg_score": 0.6}),
        "fusion": ("max", {"fusion": "max"}),
        "scale_1": (False, {"weights": (1.0, 0.0, 1.0, 1.0)}),
        "weight_3": (0.3, {"weights": (1.0, 1.0, 1.0, 0.3)}),
        "denoise": (False, {"denoise": False}),
        "reactivate": (False, {"reactivate": False}),
        "class_number": (4, {"class_number": 4}),
        "image_label": (["plant", "llama"], {"image_label": (0, 5)}),
        "flip": (False, {}),
        "role": ("student", {}),
        "crf": (True, {"crf": explorer.gallery.config.pseudo_masks.crf}),
    }
    for name, (value, setting) in changes.items():
        explorer.controls[name].value = value
        assert explorer.settings == replace(before, **setting)
        assert torch.equal(explorer.exploration.mask, expected(explorer).mask)
        assert explorer.board.view["mask"] == explorer.exploration.mask.numpy().tobytes()
        assert explorer.board.view != view, name
        explorer.controls["reset"].click()
        assert explorer.settings == before and explorer.role == "teacher"


def test_numbers_on_the_board_are_those_of_the_exploration_and_json(explorer: Explorer) -> None:
    explorer.controls["class_number"].value = 5  # neither in the ground truth nor in the mask
    iou, curve, view = explorer.exploration.iou, explorer.exploration.iou_curve(), explorer.board.view
    assert iou is not None and curve is not None
    assert view["iou"] == [None if value != value else value for value in iou.tolist()] and view["iou"][6] is None
    assert view["curve"]["at"] == [explorer.settings.bg_score, view["iou"]]
    assert np.allclose(np.array(view["curve"]["ious"], dtype=float), curve, equal_nan=True)
    opacity = explorer.controls["opacity"]
    opacity.value = 0.4
    assert explorer.board.opacity == 0.4 and explorer.board.view is view  # appearance only


def test_errors_are_shown_and_the_picture_stays(explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        explorer.controls[f"scale_{number}"].value = False
    assert explorer.board.status["kind"] == "error" and "switch at least one on" in explorer.board.status["text"]
    assert explorer.exploration.settings.weights == (0.0, 0.0, 0.0, 1.0)
    explorer.controls["scale_3"].value = True
    assert explorer.board.status["text"] == ""

    def fail(*arguments: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(explorer_module.state, "explore", fail)
    with pytest.raises(RuntimeError):
        explorer.controls["denoise"].value = False
    assert explorer.board.status == {"text": "RuntimeError: out of memory", "kind": "error"}


def picture(seed: int = 0) -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def upload(explorer: Explorer, name: str, content: bytes) -> None:
    given = {"name": name, "type": "image/png", "size": len(content), "content": memoryview(content)}
    explorer._reporting(lambda change: explorer._add_photo(change["new"]))({"new": (given,)})


def test_photos_go_to_imagenets_network_and_their_label_can_be_corrected(explorer: Explorer) -> None:
    upload(explorer, "letter.jpg", b"dear sir")
    assert explorer.board.status["kind"] == "error" and "letter.jpg cannot be read" in explorer.board.status["text"]
    assert len(explorer.galleries) == 1
    upload(explorer, "first.png", picture())
    assert explorer.board.index == 0 and len(explorer.board.images) == 1
    assert len(explorer.board.view["class_names"]) == LIKELIEST_CLASSES and explorer.board.view["curve"] is None
    score = explorer.controls["bg_score"]
    score.value = np.nextafter(score.value, 1)  # as a browser rounds it when it shows the slider
    assert "first.png: the network predicts" in explorer.board.status["text"]
    upload(explorer, "second.png", picture(1))  # the same gallery takes it
    assert explorer.board.index == 1 and len(explorer.board.images) == 2
    explorer.controls["image_label"].value = [explorer.gallery.names(1)[1]]
    assert set(explorer.exploration.mask.unique().tolist()) <= {0, 2} and not explorer.board.status["text"]
    explorer.controls["reset"].click()
    explorer.tabs.value = 0
    assert len(explorer.board.images) == 3 and explorer.board.view["truth"]
    explorer.tabs.value = 1
    assert len(explorer.board.images) == 2


def test_photos_are_the_first_tab_and_the_drawn_set_the_second(photos: PhotoGallery, pretrained: Gallery) -> None:
    explorer = Explorer(photos, pretrained)
    assert [title for title, _ in explorer.tabs.options] == ["photos", "drawn set"]
    view = explorer.board.view
    assert view["likeliest"][0][0] == "Egyptian cat" and view["truth"] is None and "search" in explorer.controls
    explorer.controls["next"].click()
    offered = explorer.controls["image_label"].allowed_tags
    assert offered == list(photos.names(1)) == explorer.board.view["class_names"] and offered[0] == "espresso"
    explorer.tabs.value = 1
    assert "controlled experiment" in explorer._about.value and explorer.board.view["curve"] is not None
    with pytest.raises(DataError, match=r"holds no image yet; .* Explorer.of_photos"):
        Explorer(Gallery.photos(()))


def test_search_adds_a_class_to_the_label_and_shows_it(photos: PhotoGallery) -> None:
    explorer, score = Explorer(photos), 0.6
    explorer.controls["bg_score"].value = score
    explorer.controls["class_number"].value = 3
    assert explorer.board.view["erased"] and not explorer.exploration.fused.any()  # not in the image label
    explorer.controls["search"].value = "catamaran"
    assert explorer.controls["search"].value == "" and explorer.settings.bg_score == score
    assert explorer.settings.image_label == (0, 5) and explorer.settings.class_number == 5
    assert explorer.exploration.fused.max() > 0.9 and not explorer.board.view["erased"]
    explorer.controls["search"].value = "a person"
    assert explorer.board.status["kind"] == "error" and "'a person'" in explorer.board.status["text"]


def test_saved_page_holds_the_photos(photos: PhotoGallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    explorer = Explorer(photos, index=1)
    explorer.controls["page"].click()
    assert str(tmp_path / "explorer_photos.html") in explorer.board.status["text"]
    data = data_of((tmp_path / "explorer_photos.html").read_text())
    assert [image["name"] for image in data["images"]] == ["chelsea", "coffee"] and data["start"]["index"] == 1
    for number, image in enumerate(data["images"]):
        assert image["class_names"] == list(photos.names(number)) and image["label"] == [0] and image["truth"] is None
        assert image["likeliest"][0][0] == photos.names(number)[0]


def test_a_network_of_photos_takes_a_photo_itself(explorer: Explorer) -> None:
    explorer.gallery.knows_photos = True
    upload(explorer, "mine.png", picture())
    assert explorer.board.index == 3 and len(explorer.board.images) == 4


def test_in_a_kernel_the_crf_waits_for_a_rest_and_runs_once(
    explorer: Explorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explorer_module, "REST_SECONDS", 0.05)
    refined = []
    explore = explorer_module.state.explore

    def counted(sample, cams, scales, settings):  # type: ignore[no-untyped-def]
        refined.extend([settings.bg_score] if settings.crf else [])
        return explore(sample, cams, scales, settings)

    monkeypatch.setattr(explorer_module.state, "explore", counted)

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
    assert explorer.board.status["kind"] == "" and torch.equal(explorer.exploration.mask, expected(explorer).mask)
