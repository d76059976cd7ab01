"""ImageNet's classifier as a source of attention on photos."""

from __future__ import annotations

import pytest
import torch

from smaflib.cams import multi_scale_cams
from smaflib.models.imagenet import LIKELY, ImageNetClassifier, imagenet_config

CHIHUAHUA, TABBY, PIZZA = 151, 281, 963


@pytest.fixture(scope="module")
def network() -> ImageNetClassifier:
    network = ImageNetClassifier()
    network.classes = [TABBY, PIZZA, CHIHUAHUA]
    return network


def test_classes_have_their_first_name(network: ImageNetClassifier) -> None:
    assert network.class_names == ("tabby", "pizza", "Chihuahua")


def test_image_logit_is_above_0_where_a_class_is_likely(network: ImageNetClassifier) -> None:
    logits = torch.full((1, 1000, 2, 3), -30.0)
    logits[0, [TABBY, PIZZA, 999]] = torch.log(torch.tensor([LIKELY - 0.01, LIKELY + 0.01, 0.8])).view(3, 1, 1)
    tabby, pizza, chihuahua = network.image_logits(logits)[0].tolist()
    assert pizza > 0 > tabby > chihuahua


def test_attention_is_above_the_mean_of_the_thousand_by_hand(network: ImageNetClassifier) -> None:
    logits = torch.zeros(1, 1000, 1, 2)
    logits[0, PIZZA, 0] = torch.tensor([100.0, -100.0])
    torch.testing.assert_close(
        network.attention(logits)[0, :, 0], torch.tensor([[0.0, 0.1], [99.9, 0.0], [0.0, 0.1]]), rtol=1e-5, atol=1e-5
    )


def test_likeliest_classes_and_maps_of_all_scales(network: ImageNetClassifier) -> None:
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    likeliest = network.likeliest_classes(image, 4)
    assert len(set(likeliest)) == 4 and network.likeliest_classes(image, 2) == likeliest[:2]
    cams = multi_scale_cams(network, image, imagenet_config().attention.scales)
    assert [tuple(cam.shape) for cam in cams] == [(3, 2, 3), (3, 3, 5), (3, 4, 6), (3, 6, 9)]
