"""Attention maps of a split, fused and denoised when they are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import make_samples

from smaflib.cams import FUSION_RULES, fuse_cams
from smaflib.maps import AttentionMaps, DenoisedMaps, MaskMaps, fuse_and_denoise
from smaflib.reactivation import denoise


@pytest.fixture
def maps(tmp_path: Path) -> AttentionMaps:
    maps = AttentionMaps(tmp_path, (0.5, 1.0))
    for seed, image_id in enumerate(make_samples(3).image_ids):
        torch.manual_seed(seed)
        maps.write(image_id, [torch.rand(3, 2, 3), torch.rand(3, 4, 5)], (32, 40))
    return maps


def test_denoised_maps_are_fused_and_denoised_in_the_order_of_the_split(maps: AttentionMaps) -> None:
    samples = make_samples(3).subset([2, 0])
    denoised = DenoisedMaps(maps, samples, rule="max", scales=[1.0])
    assert len(denoised) == 2
    for index, sample in enumerate(samples):
        expected = denoise(maps.fused(sample.image_id, "max", [1.0]), sample.image_label)
        assert torch.equal(denoised[index], expected)
        assert denoised[index].amax(dim=(1, 2)).round().tolist() == sample.image_label.tolist()


def test_denoised_maps_can_be_kept_in_half_precision(maps: AttentionMaps) -> None:
    samples = make_samples(3)
    lazy, cached = DenoisedMaps(maps, samples), DenoisedMaps(maps, samples, cached=True)
    first = cached[1]
    torch.testing.assert_close(first, lazy[1], rtol=1e-3, atol=1e-4)
    maps.path("image1").unlink()
    assert torch.equal(cached[1], first) and first.dtype == torch.float32
    with pytest.raises(ValueError, match="no attention maps"):
        lazy[1]


def test_only_maps_of_classes_that_are_there_are_kept(maps: AttentionMaps) -> None:
    cached = DenoisedMaps(maps, make_samples(3), cached=True)
    for index in range(3):  # image i shows class i
        assert torch.equal(cached[index], DenoisedMaps(maps, make_samples(3))[index].half().float())
        kept = cached._cache[index]
        assert kept.maps.shape == (1, 32, 40) and kept.maps.dtype == torch.float16 and kept.classes.tolist() == [index]
    everything = DenoisedMaps(maps, make_samples(3), cached=True, denoised=False)
    assert len(everything[0]) == len(everything._cache[0].maps) == 3


def test_whole_split_can_be_walked_through(maps: AttentionMaps) -> None:
    assert [tuple(denoised.shape) for denoised in DenoisedMaps(maps, make_samples(3))] == [(3, 32, 40)] * 3


@pytest.mark.parametrize("rule", FUSION_RULES)
def test_fusing_the_labelled_classes_alone_changes_nothing(rule: str) -> None:
    torch.manual_seed(0)
    cams, scales = [torch.rand(4, 2, 3), torch.rand(4, 5, 4)], (0.5, 1.0)
    for label in ([1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]):
        image_label = torch.tensor(label).float()
        expected = denoise(fuse_cams(cams, (8, 9), rule, scales), image_label)
        assert torch.equal(fuse_and_denoise(cams, (8, 9), image_label, rule, scales), expected)


def test_maps_of_absent_classes_stay_where_they_are_asked_for(maps: AttentionMaps) -> None:
    samples = make_samples(3)
    noisy = DenoisedMaps(maps, samples, denoised=False)
    assert torch.equal(noisy[1], maps.fused("image1"))
    assert not torch.equal(noisy[1], DenoisedMaps(maps, samples)[1])


def test_masks_are_maps_of_zero_and_one() -> None:
    (maps,) = MaskMaps([torch.tensor([[0, 2], [1, 2]], dtype=torch.uint8)], num_classes=2)
    assert maps.tolist() == [[[0, 0], [1, 0]], [[0, 1], [0, 1]]]
