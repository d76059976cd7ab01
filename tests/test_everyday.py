"""ImageNet's thousand classes read as those of every day."""

from __future__ import annotations

import pytest
import torch

from smaflib.cams import multi_scale_cams
from smaflib.models.everyday import CERTAIN, EVERYDAY, NUM_IMAGENET, EverydayNetwork, everyday_config


@pytest.fixture(scope="module")
def network() -> EverydayNetwork:
    return EverydayNetwork()


def test_classes_are_imagenets_by_name(network: EverydayNetwork) -> None:
    """timm knows what each number is called; the ends of each row of numbers are what is easily off by one."""
    from timm.data import ImageNetInfo

    names = {number: ImageNetInfo().index_to_description(number).split(",")[0] for number in range(NUM_IMAGENET)}
    members = {name: torch.nonzero(row)[:, 0].tolist() for name, row in zip(EVERYDAY, network.members, strict=True)}
    first_and_last = {name: (names[numbers[0]], names[numbers[-1]]) for name, numbers in members.items()}
    assert first_and_last["dog"] == ("Chihuahua", "Mexican hairless")
    assert first_and_last["cat"] == ("tabby", "Egyptian cat")
    assert first_and_last["bird"] == ("cock", "albatross")
    assert first_and_last["monkey"] == ("orangutan", "squirrel monkey")
    assert first_and_last["snake"] == ("thunder snake", "sidewinder")
    assert first_and_last["butterfly"] == ("admiral", "lycaenid")
    assert first_and_last["turtle"] == ("loggerhead", "box turtle")
    assert {names[number] for number in members["car"]} >= {"convertible", "sports car", "cab", "limousine"}
    for name in ("pizza", "zebra", "banana", "umbrella", "llama", "castle", "church", "teapot", "tractor"):
        assert [names[number] for number in members[name]] == [name]
    assert int(network.members.sum(dim=0).max()) == 1  # no number belongs to two classes


def test_label_is_what_the_probabilities_of_the_members_sum_up_to(network: EverydayNetwork) -> None:
    logits = torch.full((1, NUM_IMAGENET, 2, 3), -30.0)
    logits[0, [151, 152, 281, 999]] = torch.log(torch.tensor([0.1, 0.2, 0.05, 0.65])).view(4, 1, 1)
    found = network.image_logits(logits)[0]
    dog, cat, bird = (list(EVERYDAY).index(name) for name in ("dog", "cat", "bird"))
    odds = torch.tensor(CERTAIN / (1 - CERTAIN)).log()
    torch.testing.assert_close(found[dog] + odds, torch.tensor(0.302 / 0.698).log(), rtol=1e-3, atol=1e-3)
    assert found[dog] > 0 > found[cat] > found[bird]


def test_many_unlikely_dogs_are_no_dog(network: EverydayNetwork) -> None:
    probabilities = torch.full((NUM_IMAGENET,), 1e-6)
    probabilities[151:269] = 0.002  # 0.24 in all
    probabilities[[398, 399, 400, 401, 403]] = 0.1
    probabilities[281] = 0.05
    found = network.image_logits(probabilities.log().view(1, -1, 1, 1))[0]
    assert found[list(EVERYDAY).index("dog")] < found[list(EVERYDAY).index("cat")] == found.max() < 0


def test_map_of_a_class_is_that_of_its_likeliest_member(network: EverydayNetwork) -> None:
    logits = torch.zeros(1, NUM_IMAGENET, 1, 2)
    logits[0, 151, 0] = torch.tensor([40.0, 0.0])  # this dog is likely, and in the left cell
    logits[0, 152, 0] = torch.tensor([-20.0, 5.0])  # that one is not
    attention = network.attention(logits)[0, list(EVERYDAY).index("dog"), 0]
    assert attention[0] > 39.5 and attention[1] < 0.1
    assert (network.attention(torch.randn(2, NUM_IMAGENET, 3, 3)) >= 0).all()


def test_maps_at_all_scales(network: EverydayNetwork) -> None:
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scales = everyday_config().attention.scales
    cams = multi_scale_cams(network, image, scales)
    assert [tuple(cam.shape) for cam in cams] == [
        (len(EVERYDAY), 2, 3),
        (len(EVERYDAY), 3, 5),
        *((len(EVERYDAY), *s) for s in ((4, 6), (6, 9))),
    ]
