"""ImageNet's classifier as a source of attention on photos."""

from __future__ import annotations

import pytest
import torch

from smaflib.explorer.state import PHOTOS, Gallery
from smaflib.sources.imagenet import ImageNetClassifier, synonyms

TABBY, PIZZA = 281, 963


@pytest.fixture(scope="module")
def network() -> ImageNetClassifier:
    return ImageNetClassifier()


def test_attention_is_above_the_mean_of_the_thousand_by_hand(network: ImageNetClassifier) -> None:
    logits = torch.zeros(1, 1000, 1, 2)
    logits[0, PIZZA, 0] = torch.tensor([100.0, -100.0])
    attention = network.attention(logits)[0, [TABBY, PIZZA], 0]
    torch.testing.assert_close(attention, torch.tensor([[0.0, 0.1], [99.9, 0.0]]), rtol=1e-5, atol=1e-5)


def test_a_photo_is_recognised_at_the_networks_own_size(network: ImageNetClassifier) -> None:
    """At 512 pixels the network's probability of the espresso is below a fifth."""
    image = Gallery.photos().samples[PHOTOS.index("coffee.png")].image
    probabilities = network.probabilities(image)
    assert image.shape == (3, 341, 512) and synonyms()[int(probabilities.argmax())] == "espresso"
    assert probabilities.max() > 0.9 and abs(float(probabilities.sum()) - 1) < 1e-4
