"""Sliders of one step without a browser; tests/browser moves each of them in JupyterLab."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from smaflib.config import CrfConfig
from smaflib.explorer import sliders
from smaflib.explorer.state import Gallery
from smaflib.pseudo_masks import pseudo_mask
from smaflib.runtime import PROGRESS_FILE

WIDGET = "application/vnd.jupyter.widget-view+json"


def test_crf_sliders_begin_with_the_configs_values_and_score_the_librarys_mask(
    pretrained: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    crf = CrfConfig(gaussian_sxy=35.5, iterations=2)  # beyond the slider's usual range
    config = pretrained.config.pseudo_masks.model_copy(update={"crf": crf})
    sample, denoised = pretrained.samples[0], pretrained.explore(0, "teacher", pretrained.first_settings(0)).denoised
    scored: list[torch.Tensor] = []
    monkeypatch.setattr(sliders, "image_score", lambda mask, truth, num: scored.append(mask) or 0.5)
    shown = sliders.crf_sliders(sample, denoised, 0.35, config, pretrained.class_names)
    values = {control.description: control.value for control in shown.children[0].children}
    assert values == {name: getattr(crf, name) for name in sliders.CRF_RANGES}
    assert torch.equal(scored[1], pseudo_mask(sample.image, denoised, 0.35, config))


def test_a_run_keeps_the_picture_alone_and_a_saved_notebook_keeps_it_too(
    pretrained: Gallery, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fused = pretrained.explore(0, "teacher", pretrained.first_settings(0)).denoised
    arguments = (pretrained.samples[0], fused, 0.35, pretrained.class_names)
    monkeypatch.delenv(PROGRESS_FILE, raising=False)
    assert {WIDGET, "image/png"} <= set(sliders.row_sliders(*arguments)._repr_mimebundle_())
    monkeypatch.setenv(PROGRESS_FILE, str(tmp_path / "progress"))
    monkeypatch.setattr(sliders, "widgets", None)  # none is created: its state would stay in the notebook
    picture = sliders.row_sliders(*arguments)
    assert picture.data.startswith(b"\x89PNG") and len(picture.data) > 10_000
