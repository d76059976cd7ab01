"""Attention maps of a split, fused and denoised when they are read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import generator, make_samples

from smaflib.cams import FUSIONS, fuse_cams
from smaflib.config import AttentionConfig, EvaluationConfig
from smaflib.data.views import load_views
from smaflib.errors import ConfigError
from smaflib.evaluation import masks_of, sweep_thresholds
from smaflib.maps import AttentionMaps, FusedMaps, fuse_and_denoise, write_attention_maps
from smaflib.reactivation import denoise, hard_labels
from smaflib.runtime import Runtime


@pytest.fixture
def maps(tmp_path: Path) -> AttentionMaps:
    maps = AttentionMaps(tmp_path, (0.5, 1.0))
    for seed, image_id in enumerate(make_samples(3).image_ids):
        torch.manual_seed(seed)
        maps.write(image_id, [torch.rand(3, 2, 3), torch.rand(3, 4, 5)], (32, 40))
    return maps


def test_denoised_maps_are_fused_and_denoised_in_the_order_of_the_split(maps: AttentionMaps) -> None:
    samples = make_samples(3).subset([2, 0])
    denoised = FusedMaps(maps, samples, rule="max", scales=[1.0])
    assert len(denoised) == 2
    for index, sample in enumerate(samples):
        expected = denoise(maps.fused(sample.image_id, "max", [1.0]), sample.image_label)
        assert torch.equal(denoised[index], expected)
        assert denoised[index].amax(dim=(1, 2)).round().tolist() == sample.image_label.tolist()


def test_denoised_maps_can_be_kept_in_half_precision(maps: AttentionMaps) -> None:
    samples = make_samples(3)
    lazy, cached = FusedMaps(maps, samples), FusedMaps(maps, samples, cached=True)
    first = cached[1]
    torch.testing.assert_close(first, lazy[1], rtol=1e-3, atol=1e-4)
    maps.path("image1").unlink()
    assert torch.equal(cached[1], first) and first.dtype == torch.float32
    with pytest.raises(ValueError, match="no attention maps"):
        lazy[1]


@pytest.mark.parametrize("settings", [{}, {"denoise": False}, {"cached": True}, {"saliency_weight": 0.3}])
def test_present_maps_are_evaluated_as_whole_ones(maps: AttentionMaps, settings: dict[str, Any]) -> None:
    samples, names, config = make_samples(3), ["a", "b", "c"], EvaluationConfig(thresholds=(0.2, 0.5, 0.9))
    denoised = FusedMaps(maps, samples, **settings)
    true = [torch.randint(0, 4, (32, 40), generator=generator(seed), dtype=torch.uint8) for seed in range(3)]
    sparse, whole = (sweep_thresholds(each, true, names, config) for each in (denoised, list(denoised)))
    for threshold in config.thresholds:
        assert torch.equal(sparse[threshold].confusion, whole[threshold].confusion)
        assert torch.equal(sparse[threshold].by_size, whole[threshold].by_size)
        for mask, of_whole in zip(masks_of(denoised, threshold), denoised, strict=True):
            assert torch.equal(mask, hard_labels(of_whole, threshold))


def test_image_without_any_class_is_background(maps: AttentionMaps) -> None:
    samples = make_samples(1)
    samples = replace(samples, files=(replace(samples.files[0], labels=()),))
    denoised = FusedMaps(maps, samples)
    assert denoised[0].shape == (3, 32, 40) and not denoised[0].any()
    assert [mask.any().item() for mask in masks_of(denoised, 0.5)] == [False]


def test_large_images_come_one_by_one_on_a_cpu_and_sizes_are_not_mixed() -> None:
    samples = [*make_samples(3, size=(150, 130)), *make_samples(2, size=(300, 200)), *make_samples(1, size=(64, 64))]
    batches = load_views(samples, (1.0,), Runtime(), indices=[0, 1, 2, 3, 4, 5])
    assert [batch.indices for batch in batches] == [[0, 1, 2], [3], [4], [5]]


def test_a_scale_that_does_not_fit_into_memory_is_named(tmp_path: Path) -> None:
    class Full(torch.nn.Conv2d):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError

    config = AttentionConfig(scales=(0.5, 2.0))
    with pytest.raises(ConfigError, match="out of memory; leave the largest scale out of attention.scales"):
        write_attention_maps(Full(1, 1, 1), make_samples(2), tmp_path, config, Runtime())


@pytest.mark.parametrize("rule", FUSIONS)
def test_fusing_the_labelled_classes_alone_changes_nothing(rule: str) -> None:
    torch.manual_seed(0)
    cams, scales = [torch.rand(4, 2, 3), torch.rand(4, 5, 4)], (0.5, 1.0)
    for label in ([1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]):
        image_label = torch.tensor(label).float()
        expected = denoise(fuse_cams(cams, (8, 9), rule, scales), image_label)
        assert torch.equal(fuse_and_denoise(cams, (8, 9), image_label, rule, scales), expected)
