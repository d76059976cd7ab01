"""Pixel correlation: attention spreads to the parts of an image that look alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import generator, make_samples, slim_network
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from smaflib.cams import multi_scale_cams
from smaflib.config import AttentionConfig, Config
from smaflib.errors import ConfigError
from smaflib.maps import write_attention_maps
from smaflib.pipeline import check_networks
from smaflib.runtime import Runtime
from smaflib.sources.correlation import affinity, correlate
from smaflib.sources.imagenet import ImageNetClassifier, ImageNetSource


def test_the_cosine_of_centred_features_is_raised_to_the_exponent() -> None:
    # Centred: (1, 0), (-1, 0), (0, 0), so that the last cell is like none, not even itself.
    features = torch.tensor([[[[2.0, 0.0, 1.0]], [[3.0, 3.0, 3.0]]]])
    assert affinity([features], (1, 3), exponent=2)[0].tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]
    # Features of any size weigh the same. Cells 0 and 1 have the cosines 1 and 0, so 0.5; cell 2 is like neither.
    small, large = torch.tensor([[[[1.0, 1.0, -2.0]]]]), torch.tensor([[[[90.0, 0.0, -90.0]], [[0.0, 90.0, -90.0]]]])
    expected = torch.tensor([[2 / 3, 1 / 3, 0], [1 / 3, 2 / 3, 0], [0, 0, 1]])
    torch.testing.assert_close(affinity([small, large], (1, 3), exponent=1)[0], expected)


@given(st.integers(0, 10**6), st.floats(0.5, 8))
def test_maps_stay_between_zero_and_their_maximum(seed: int, exponent: float) -> None:
    source = generator(seed)
    maps = [torch.rand(2, 3, height, 4, generator=source) for height in (2, 3, 5)]
    features = [torch.randn(2, 5, 6, 8, generator=source), torch.randn(2, 4, 3, 4, generator=source)]
    for before, after in zip(maps, correlate(maps, (3, 4), features, exponent), strict=True):
        assert after.shape == (2, 3, 3, 4) and bool((after >= 0).all())
        assert bool((after.amax(dim=(2, 3)) <= before.amax(dim=(2, 3)) + 1e-5).all())


def test_stored_maps_are_those_of_single_images(tmp_path: Path) -> None:
    samples, network, scales = make_samples(2), slim_network(), (0.5, 1.0)
    config = AttentionConfig(scales=scales, correlation=3)
    maps = write_attention_maps(network, samples, tmp_path, config, Runtime())
    cams = multi_scale_cams(network, samples[1].image, scales, correlation=3)
    present = list(samples.files[1].labels)
    for stored, cam in zip(maps.read(samples.image_ids[1])[0], cams, strict=True):
        assert cam.shape == cams[1].shape  # one grid for all scales
        torch.testing.assert_close(stored[present], cam[present], rtol=2e-3, atol=2e-3)


def test_imagenets_classifier_correlates_features_from_stride_4_on() -> None:
    source = ImageNetSource(ImageNetClassifier(), [[281], [504]])
    assert [tuple(each.shape) for each in source.features(torch.zeros(1, 3, 64, 96))] == [
        (1, 24, 16, 24),
        (1, 48, 8, 12),
        (1, 120, 4, 6),
    ]


class FinalFeatures(nn.Conv2d):
    """A custom backbone without features in between."""

    num_features = 8

    def __init__(self, config: object) -> None:
        super().__init__(3, 8, 8, stride=8)


def test_a_backbone_without_features_in_between_is_refused() -> None:
    model = {"backbone": "test_correlation:FinalFeatures", "weights": None, "freeze_batch_norm": False}
    config = Config.model_validate({"data": {"kind": "mini"}, "model": model, "attention": {"correlation": 3}})
    with pytest.raises(ConfigError, match=r"attention\.correlation needs a backbone"):
        check_networks(config)
