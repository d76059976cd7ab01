"""A wrapped classifier: the mean of its class maps is its logits, whatever the architecture."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from smaflib import multi_scale_cams, wrap
from smaflib.data.transforms import normalize

MODELS = {
    "timm resnet18": lambda: timm.create_model("resnet18", num_classes=7),
    "timm efficientnet": lambda: timm.create_model("efficientnet_b0", num_classes=7),
    "torchvision convnext": lambda: torchvision.models.convnext_tiny(num_classes=7),
    "torchvision densenet": lambda: torchvision.models.densenet121(num_classes=7),
    "torchvision regnet": lambda: torchvision.models.regnet_y_400mf(num_classes=7),
}


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_mean_of_the_class_maps_and_the_bias_are_the_logits(name: str) -> None:
    model = MODELS[name]()
    network = wrap(model, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    images = noise(2, 3, 128, 160)
    maps, logits = network(images), model(images)
    assert maps.shape[:2] == (2, 7) and maps.shape[2:].numel() > 1
    torch.testing.assert_close(maps.mean(dim=(2, 3)) + network.bias, logits, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(network.image_logits(maps), logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: timm.create_model("vit_tiny_patch16_384", num_classes=7),
        lambda: timm.create_model("mobilenetv3_small_050", num_classes=7),
        lambda: timm.create_model("resnet18", num_classes=7, global_pool="max"),
        lambda: torchvision.models.squeezenet1_0(num_classes=7),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 16, 16), nn.Flatten(), nn.Linear(4 * 14 * 14, 7)),  # as VGG
    ],
    ids=["transformer", "nonlinear head", "maximum", "no linear layer", "no mean"],
)
def test_other_heads_have_no_class_maps(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match="has no class activation maps: its logits are not a linear layer of the mean"):
        wrap(make())


def test_maps_by_hand() -> None:
    model = nn.Sequential(nn.AvgPool2d(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    with torch.no_grad():
        model[3].weight.copy_(torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]]))
    network = wrap(model, classes=[1, 0])
    images = torch.tensor([[3.0, -1.0], [1.0, -2.0], [5.0, 0.0]]).view(1, 3, 1, 2)  # two cells
    images = images.repeat_interleave(16, dim=2).repeat_interleave(16, dim=3)
    torch.testing.assert_close(network(images)[0, :, 0], torch.tensor([[-2.0, -1.0], [2.0, -4.0]]))
    torch.testing.assert_close(network.attention(network(images))[0, :, 0], torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
    assert network.state_dict().keys() == {"model.3.weight", "model.3.bias"}


def test_images_reach_the_model_as_it_expects_them() -> None:
    class Timm(nn.Sequential):
        pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "input_size": (3, 32, 32)}

    model = Timm(nn.AvgPool2d(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        model[3].weight.copy_(torch.eye(3))
    white = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    (cam,) = multi_scale_cams(wrap(model), white, scales=[1.0])
    torch.testing.assert_close(cam, torch.full((3, 2, 2), 2.0))  # (1 - 0.5) / 0.25
    torch.testing.assert_close(wrap(model, (0,), (0, 0, 0), (1, 1, 1))(normalize(white)[None]), torch.ones(1, 3, 2, 2))
