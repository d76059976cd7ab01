"""What the page without a kernel holds; tests/browser compares what it computes with the library."""

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
from smaflib.explorer.page import MAX_BYTES, MAX_OTHERS, PAGE_SIDE, explorer_page, page_image, quantize, run_lengths
from smaflib.explorer.state import Gallery


def data_of(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="smaf-data">(.*?)</script>', page, re.DOTALL)
    data: dict[str, Any] = json.loads(text)
    return data


def test_page_holds_images_and_maps(pretrained: Gallery) -> None:
    gallery = replace(pretrained, title="my <maps>")
    page = explorer_page(gallery, index=1)
    assert "my &lt;maps&gt;</title>" in page and len(page) < 1_000_000
    data = data_of(page)
    assert [image["name"] for image in data["images"]] == [sample.image_id for sample in gallery.samples]
    assert data["start"]["index"] == 1 and data["start"]["cls"] == gallery.first_settings(1).class_number
    image, mask = data["images"][2], gallery.samples[2].mask
    assert image["label"] == list(gallery.first_settings(2).image_label) and mask is not None
    assert np.repeat(image["truth"][::2], image["truth"][1::2]).tolist() == mask.flatten().tolist()
    levels = np.frombuffer(base64.b64decode(image["maps"]["student"]["data"]), np.uint8)
    assert image["shapes"] == [[8, 8], [16, 16], [24, 24], [32, 32]]
    assert len(levels) == 6 * sum(h * w for h, w in image["shapes"])
    # Scale by scale, class by class: the first map of scale 1 begins after six maps of scale 0.5.
    cam, peak = gallery.cams(2, "student", True)[1][0], image["maps"]["student"]["peaks"][1][0]
    kept = levels[6 * 64 : 6 * 64 + 256].reshape(16, 16) / 255 * peak
    assert np.abs(kept - cam.numpy()).max() <= peak / 510 + 1e-7


def test_run_lengths_and_quantized_maps_by_hand() -> None:
    assert run_lengths(torch.tensor([[0, 0, 3], [3, 255, 0]], dtype=torch.uint8)) == [0, 2, 3, 2, 255, 1, 0, 1]
    levels, peaks = quantize([torch.tensor([[[0.0, 2.0, 4.0]]]), torch.zeros(1, 1, 1)])
    assert [level.tolist() for level in levels] == [[[[0, 128, 255]]], [[[0]]]] and peaks.tolist() == [[4], [0]]


def many_classes(pretrained: Gallery, num_classes: int, size: tuple[int, int], num: int = 1) -> Gallery:
    """Images without ground truth or network, maps given: class k peaks at k."""
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


def test_labelled_and_strongest_classes_are_kept_and_large_images_shrunk(pretrained: Gallery) -> None:
    image = page_image(many_classes(pretrained, 20, (2048, 1024)), 0)
    assert image["classes"] == [0, *range(20 - MAX_OTHERS, 20)] and image["truth"] is None
    assert image["shrunk"] and image["size"] == [PAGE_SIDE, PAGE_SIDE // 2] and image["shapes"] == [[64, 32]] * 4
    assert image["maps"]["teacher"]["peaks"] == [image["classes"]] * 4


def test_as_many_images_as_fit(pretrained: Gallery) -> None:
    large = many_classes(pretrained, 20, (512, 512), num=40)
    page = explorer_page(large, index=39)
    data = data_of(page)
    assert 3 <= len(data["images"]) < 40 and len(page) <= MAX_BYTES + 100_000 and data["start"]["index"] == 0


def test_maps_of_a_custom_rule_are_computed_with_the_page(
    pretrained: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_page_rule2.py").write_text("def least(maps, scales): return maps.amin(dim=0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    rule = "own_page_rule2:least"
    attention = pretrained.config.attention.model_copy(update={"fusion": rule})
    gallery = replace(pretrained, config=pretrained.config.model_copy(update={"attention": attention}))
    data = data_of(explorer_page(gallery))
    assert data["rules"][3:] == ["size_adaptive", rule]
    assert data["computed_rules"] == [rule] and data["start"]["fusion"] == rule
    image = data["images"][0]
    prefix, _, content = image["maps"]["student"]["fused"][rule].partition(",")
    with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
        assert prefix == "data:image/png;base64" and picture.mode == "L"
        kept = np.array(picture).reshape(len(image["classes"]), *image["size"]) / 255
    expected = fuse_cams(gallery.cams(0, "student", True), tuple(image["size"]), rule, gallery.scales)
    assert np.abs(kept - expected[image["classes"]].numpy()).max() <= 1 / 510 + 1e-6
