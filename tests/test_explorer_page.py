"""The page without kernel: what it holds. What it computes is compared with the library in tests/browser."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from smaflib.cams import fuse_cams
from smaflib.config import dump_config
from smaflib.data import make_data
from smaflib.errors import RunError
from smaflib.explorer.page import (
    MAX_BYTES,
    MAX_OTHERS,
    PAGE_SIDE,
    dequantize,
    explorer_frame,
    explorer_page,
    page_image,
    quantize,
    run_lengths,
    write_explorer,
)
from smaflib.explorer.state import Gallery
from smaflib.maps import AttentionMaps
from smaflib.models.pretrained import pretrained_config
from smaflib.report.html import network_references, write_index
from smaflib.runs import open_run


@pytest.fixture(scope="module")
def gallery() -> Gallery:
    return Gallery.pretrained(3)


def data_of(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="smaf-data">(.*?)</script>', page, re.DOTALL)
    data: dict[str, Any] = json.loads(text)
    return data


def test_page_holds_images_and_maps_and_asks_no_network(gallery: Gallery) -> None:
    page = explorer_page(gallery, "My <maps>", index=1)
    assert network_references(page) == [] and "<title>My &lt;maps&gt;</title>" in page
    assert len(page) < 1_000_000
    data = data_of(page)
    assert [image["name"] for image in data["images"]] == [sample.image_id for sample in gallery.samples]
    assert data["start"]["index"] == 1 and data["start"]["cls"] == gallery.first_settings(1).class_number
    assert data["scales"] == [0.5, 1, 1.5, 2] and len(data["class_names"]) == 6
    image = data["images"][2]
    assert image["label"] == list(gallery.first_settings(2).image_label)
    levels = np.frombuffer(base64.b64decode(image["maps"]["student"]["data"]), np.uint8)
    assert image["shapes"] == [[8, 8], [16, 16], [24, 24], [32, 32]]
    assert len(levels) == 6 * sum(h * w for h, w in image["shapes"])
    # Scale by scale, class by class: the first map of scale 1 begins after six maps of scale 0.5.
    cam, peak = gallery.cams(2, "student", True)[1][0], image["maps"]["student"]["peaks"][1][0]
    kept = levels[6 * 64 : 6 * 64 + 256].reshape(16, 16) / 255 * peak
    assert np.abs(kept - cam.numpy()).max() <= peak / 510 + 1e-7


def test_ground_truth_is_kept_exactly_or_not_at_all(gallery: Gallery) -> None:
    runs = page_image(gallery, 0)["truth"]
    mask = gallery.samples[0].mask
    assert mask is not None
    assert np.repeat(runs[::2], runs[1::2]).tolist() == mask.flatten().tolist()
    blind = Gallery([replace(gallery.samples[0], mask=None)], gallery.class_names, gallery.config, gallery.networks)
    assert page_image(blind, 0)["truth"] is None


def test_run_lengths_by_hand() -> None:
    assert run_lengths(torch.tensor([[0, 0, 3], [3, 255, 0]], dtype=torch.uint8)) == [0, 2, 3, 2, 255, 1, 0, 1]
    assert run_lengths(torch.zeros(2, 2, dtype=torch.uint8)) == [0, 4]


def test_quantized_maps_lose_half_a_step_at_most() -> None:
    cams = [torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(0)) * 7, torch.zeros(2, 3, 3)]
    levels, peaks = quantize(cams)
    assert [level.dtype for level in levels] == [torch.uint8] * 2 and int(levels[0].max()) == 255
    assert peaks.shape == (2, 2) and peaks[1].tolist() == [0, 0]
    again = dequantize(levels, peaks)
    assert float((again[0] - cams[0]).abs().max()) <= float(peaks.max()) / 510 + 1e-6
    assert torch.equal(again[1], cams[1])


def many_classes(num_classes: int, size: tuple[int, int], num: int = 1) -> Gallery:
    """Images without ground truth or network, maps given: class k peaks at k."""
    pretrained = Gallery.pretrained(1)
    image_label = torch.zeros(num_classes)
    image_label[0] = 1
    image = torch.zeros(3, *size, dtype=torch.uint8)
    samples = [replace(pretrained.samples[0], image=image, image_label=image_label, mask=None) for _ in range(num)]
    names = tuple(f"class {k}" for k in range(num_classes))
    made = Gallery(samples, names, pretrained.config, pretrained.networks)
    peaks = torch.arange(num_classes).float()[:, None, None]
    for index in range(num):
        for role in made.roles:
            made._cams[index, role, True] = [peaks.expand(-1, size[0] // 8, size[1] // 8)] * 4
    return made


def test_of_many_classes_the_labelled_and_the_strongest_others_are_kept() -> None:
    image = page_image(many_classes(20, (64, 96)), 0)
    assert image["classes"] == [0, *range(20 - MAX_OTHERS, 20)]


def test_own_rules_come_with_the_maps_that_python_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_page_rule2.py").write_text("def least(maps, scales): return maps.amin(dim=0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    gallery = Gallery.pretrained(1)
    rule = "own_page_rule2:least"
    attention = gallery.config.attention.model_copy(update={"fusion": rule})
    gallery.config = gallery.config.model_copy(update={"attention": attention})
    data = data_of(explorer_page(gallery))
    assert data["rules"][-1] == [rule, rule] and data["rules"][3] == ["size_adaptive", "size-adaptive"]
    assert data["computed_rules"] == [rule] and data["start"]["fusion"] == rule
    image = data["images"][0]
    prefix, _, content = image["maps"]["student"]["fused"][rule].partition(",")
    with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
        assert prefix == "data:image/png;base64" and picture.mode == "L"
        kept = np.array(picture).reshape(len(image["classes"]), *image["size"]) / 255
    expected = fuse_cams(gallery.cams(0, "student", True), tuple(image["size"]), rule, gallery.scales)
    assert np.abs(kept - expected[image["classes"]].numpy()).max() <= 1 / 510 + 1e-6


def test_large_images_are_shrunk_with_their_maps() -> None:
    image = page_image(many_classes(3, (2048, 1024)), 0)
    assert image["shrunk"] and image["size"] == [PAGE_SIDE, PAGE_SIDE // 2]
    assert image["shapes"] == [[64, 32]] * 4
    assert image["maps"]["teacher"]["peaks"] == [[0, 1, 2]] * 4
    assert not page_image(many_classes(3, (64, 64)), 0)["shrunk"]


def test_as_many_images_as_fit() -> None:
    large = many_classes(20, (512, 512), num=40)
    page = explorer_page(large, index=39)
    data = data_of(page)
    assert 3 <= len(data["images"]) < 40 and len(page) <= MAX_BYTES
    assert len(data["thumbs"]) == len(data["images"]) and data["start"]["index"] == 0
    # The image that was asked for comes first where it has found room, though others have not.
    assert data_of(explorer_page(large, index=1))["start"]["index"] == 1
    with pytest.raises(ValueError, match="not even one image fits"):
        explorer_page(large, max_bytes=1000)


def test_frame_in_a_notebook_holds_the_whole_page(gallery: Gallery) -> None:
    html = explorer_frame(gallery).data
    assert html.count("<iframe") == 1 and 'srcdoc="&lt;!DOCTYPE html&gt;' in html
    assert network_references(html) == []
    found = network_references(html.replace("&lt;/head&gt;", "&lt;script src=&quot;https://example.org/a.js&quot;&gt;"))
    assert found == ["script src=https://example.org/a.js"]  # what is in the frame is checked, too


def test_report_of_a_run_holds_its_explorer(tmp_path: Path) -> None:
    config = pretrained_config()
    data = config.data.model_copy(update={"num_train": 3, "num_val": 1, "image_size": 64})
    file = tmp_path / "small.yaml"
    file.write_text(dump_config(config.model_copy(update={"data": data})))
    run = open_run(tmp_path / "runs" / "small", file)
    make_data(run.config, run.folder)
    assert "explorer.html" not in write_index(run).read_text()
    with pytest.raises(RunError, match="no attention maps yet"):
        write_explorer(run)
    for role in ("teacher", "student"):
        maps = AttentionMaps(run.path("cams", role), run.config.attention.scales)
        for image_id in run.samples("train").image_ids:
            maps.write(image_id, [torch.rand(6, 4, 4)] * 4, (64, 64))
    page = write_explorer(run).read_text()
    assert network_references(page) == [] and "run small" in page
    assert set(data_of(page)["images"][0]["maps"]) == {"teacher", "student"}
    index = write_index(run).read_text()
    assert 'src="explorer.html"' in index and network_references(index) == []
