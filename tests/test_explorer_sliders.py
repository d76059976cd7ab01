"""Sliders of one step without a browser; tests/browser moves each of them in JupyterLab."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smaflib.cams import fuse_cams, multi_scale_cams
from smaflib.config import CrfConfig
from smaflib.data import Samples, load_samples, make_data
from smaflib.explorer import sliders
from smaflib.maps import AttentionMaps
from smaflib.models.pretrained import pretrained_network, short_config
from smaflib.pseudo_masks import pseudo_mask
from smaflib.reactivation import denoise
from smaflib.runtime import PROGRESS_FILE

WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Samples, AttentionMaps]:
    folder = tmp_path_factory.mktemp("drawn")
    config = short_config(folder / "data")
    config = config.model_copy(update={"data": config.data.model_copy(update={"num_train": 2, "num_val": 1})})
    make_data(config, folder)
    samples = load_samples(config, "train").with_ground_truth()
    maps = AttentionMaps(folder / "cams", config.attention.scales)
    for sample in samples:
        cams = multi_scale_cams(pretrained_network("teacher"), sample.image, maps.scales)
        maps.write(sample.image_id, cams, (sample.image.shape[-2], sample.image.shape[-1]))
    return samples, maps


def crf_sliders(drawn: tuple[Samples, AttentionMaps], crf: CrfConfig) -> tuple[Any, Any]:
    (samples, maps), config = drawn, short_config(Path()).pseudo_masks.model_copy(update={"crf": crf})
    sample = samples[0]
    denoised = denoise(fuse_cams(*maps.read(sample.image_id)), sample.image_label)
    expected = pseudo_mask(sample.image, denoised, 0.35, config)
    return sliders.crf_sliders(sample, denoised, 0.35, config, samples.class_names), expected


def test_crf_sliders_begin_with_the_configs_values_and_score_the_librarys_mask(
    drawn: tuple[Samples, AttentionMaps], monkeypatch: pytest.MonkeyPatch
) -> None:
    crf = CrfConfig(gaussian_sxy=35.5, iterations=2)  # beyond the slider's usual range
    scored: list[torch.Tensor] = []
    monkeypatch.setattr(sliders, "image_score", lambda mask, truth, num: scored.append(mask) or 0.5)
    shown, expected = crf_sliders(drawn, crf)
    values = {control.description: control.value for control in shown.children[0].children}
    assert values == {name: getattr(crf, name) for name in sliders.CRF_RANGES}
    assert torch.equal(scored[1], expected)


def test_all_weights_at_zero_are_refused(drawn: tuple[Samples, AttentionMaps], capsys: pytest.CaptureFixture) -> None:
    samples, maps = drawn
    shown = sliders.scale_sliders(samples, maps, 0.35)
    for control in shown.children[0].children[2:]:
        control.value = 0.0
    assert "give one of them more" in capsys.readouterr().out


def test_a_run_keeps_the_picture_alone_and_a_saved_notebook_keeps_it_too(
    drawn: tuple[Samples, AttentionMaps], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    samples, maps = drawn
    arguments = (samples[0], fuse_cams(*maps.read(samples.image_ids[0])), 0.35, samples.class_names)
    monkeypatch.delenv(PROGRESS_FILE, raising=False)
    assert {WIDGET, "image/png"} <= set(sliders.row_sliders(*arguments)._repr_mimebundle_())
    monkeypatch.setenv(PROGRESS_FILE, str(tmp_path / "progress"))
    monkeypatch.setattr(sliders, "widgets", None)  # none is created: its state would stay in the notebook
    picture = sliders.row_sliders(*arguments)
    assert picture.data.startswith(b"\x89PNG") and np.frombuffer(picture.data, np.uint8).size > 10_000
