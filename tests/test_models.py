"""Backbones and networks: strides, dilation, frozen layers, the student's start."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from helpers import generator, same_weights, tiny_config
from torch import Tensor, nn

from smaflib.config import ModelConfig, SegmentationConfig
from smaflib.errors import ConfigError, WeightsError
from smaflib.models import AttentionNetwork, SegmentationNetwork, with_background
from smaflib.models.backbones import TorchvisionBackbone, build_backbone
from smaflib.models.networks import load_attention_network
from smaflib.models.weights.files import has_segmentation_head, write_weights


def model_config(backbone: str = "slim", **settings: object) -> ModelConfig:
    return ModelConfig.model_validate({"backbone": backbone} | settings)


def alive(network: nn.Module, seed: int = 0) -> nn.Module:
    """Random statistics for every BatchNorm, so that a confusion of layers or modes shows; eval mode."""
    source = generator(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.copy_(torch.randn(module.num_features, generator=source) * 0.1)
            module.running_var.copy_(torch.rand(module.num_features, generator=source) * 0.5 + 0.75)
    return network.eval()


def random_images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


# --- backbones --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "output_stride", "stride"),
    [
        *(("resnet18", stride, stride) for stride in (8, 16, 32)),
        *(("vgg11", stride, stride) for stride in (8, 16, 32)),
        *(("mobilenet_v2", stride, stride) for stride in (8, 16, 32)),
        ("resnet50", 8, 8),
        ("slim", 8, 8),
        ("slim", 16, 8),  # has no other
        ("squeezenet1_0", 8, 8),
        ("squeezenet1_0", 16, 16),
        ("squeezenet1_0", 32, 16),  # has stride 16 by itself
        ("densenet121", 8, 32),  # average pools: keeps the stride that it has
        ("convnext_tiny", 8, 32),  # 2x2 convolutions: likewise
    ],
)
def test_output_stride_is_as_promised(name: str, output_stride: int, stride: int) -> None:
    with torch.device("meta"):  # shapes without arithmetic
        backbone = build_backbone(model_config(name, output_stride=output_stride))
        small, large = backbone(torch.empty(2, 3, 96, 160)), backbone(torch.empty(2, 3, 160, 288))
        early, late = backbone.features(torch.empty(2, 3, 96, 160))
    assert small.shape[:2] == (2, backbone.num_features) and late.shape == small.shape
    # So many cells more for so many pixels more; borders may differ by a cell.
    assert (large.shape[2] - small.shape[2]) * stride == 160 - 96
    assert (large.shape[3] - small.shape[3]) * stride == 288 - 160
    assert abs(small.shape[2] * stride - 96) <= stride
    if backbone.skip_channels:
        assert early.shape == (2, backbone.skip_channels, 24, 40)


def test_backbone_at_its_own_stride_is_torchvisions_model() -> None:
    torch.manual_seed(0)
    backbone = build_backbone(model_config("resnet18", output_stride=32))
    assert isinstance(backbone, TorchvisionBackbone)
    model = torchvision.models.resnet18()
    stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool, model.layer1)
    features = nn.Sequential(stem, nn.Sequential(model.layer2, model.layer3, model.layer4))
    features.load_state_dict(dict(zip(features.state_dict(), backbone.state_dict().values(), strict=True)))
    images = random_images(1, 3, 64, 96)
    assert torch.equal(alive(backbone)(images), alive(features)(images))


@pytest.mark.parametrize(
    ("name", "output_stride"), [("resnet18", 8), ("resnet18", 16), ("resnet50", 8), ("mobilenet_v2", 16)]
)
def test_dilation_keeps_the_pretrained_function(name: str, output_stride: int) -> None:
    """The dilated network gives the strided one's features, and others between them (the "hole algorithm")."""
    torch.manual_seed(0)
    strided = alive(build_backbone(model_config(name, output_stride=32)))
    with torch.device("meta"):
        dense = build_backbone(model_config(name, output_stride=output_stride)).eval()
    dense.load_state_dict(strided.state_dict(), assign=True)
    images, step = random_images(1, 3, 64, 96), 32 // output_stride
    with torch.no_grad():
        expected, given = strided(images), dense(images)
    assert given.shape[2:] == (64 // output_stride, 96 // output_stride)
    torch.testing.assert_close(given[..., ::step, ::step], expected, rtol=1e-4, atol=1e-4 * float(expected.max()))


def test_dilated_resnet50_is_torchvisions_dilated_resnet50() -> None:
    with torch.device("meta"):
        ours = build_backbone(model_config("resnet50", output_stride=8))
        theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True])

    def geometry(module: nn.Module) -> list[tuple[object, ...]]:
        convolutions = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
        return [(part.kernel_size, part.stride, part.dilation, part.padding) for part in convolutions]

    assert geometry(ours) == geometry(theirs)


def test_slim_network_ends_at_stride_8_and_skips_at_stride_4() -> None:
    with torch.device("meta"):
        early, late = build_backbone(model_config()).features(torch.empty(1, 3, 64, 48))
    assert early.shape == (1, 32, 16, 12) and late.shape == (1, 96, 8, 6)


def test_unknown_backbone_is_refused() -> None:
    with pytest.raises(ConfigError, match="'resnet5', which is neither 'slim' nor 'resnet38' nor a"):
        build_backbone(model_config("resnet5"))
    with pytest.raises(
        ConfigError, match="'fcn_resnet50', which is neither"
    ):  # torchvision's, but no classification model
        build_backbone(model_config("fcn_resnet50"))


@pytest.mark.parametrize("name", ["mnasnet0_5", "shufflenet_v2_x0_5", "swin_t"])
def test_backbone_without_convolutional_feature_maps_is_refused(name: str) -> None:
    with (
        torch.device("meta"),
        pytest.raises(ConfigError, match=f"{name}' has no plain convolutional features; choose a"),
    ):
        build_backbone(model_config(name))


# --- the attention network --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_channels", [0, 7])
@pytest.mark.parametrize("background", [False, True])
def test_logit_maps_and_attention(head_channels: int, background: bool) -> None:
    network = AttentionNetwork(model_config(head_channels=head_channels), 3, background).eval()
    logits = network(random_images(2, 3, 32, 48))
    assert logits.shape == (2, 3 + background, 4, 6)
    attention = network.attention(logits)
    assert attention.shape == (2, 3, 4, 6) and attention.min() >= 0
    assert network.head.bias is None
    assert network.image_logits(logits).shape == (2, 3)


def test_image_logits_are_means_of_the_foreground_maps() -> None:
    logits = torch.tensor([[[[100.0, 100.0]], [[1.0, 3.0]], [[-1.0, 0.0]]]])  # (1, 3, 1, 2)
    with_map = AttentionNetwork(model_config(), 2, background=True)
    assert with_map.image_logits(logits).tolist() == [[2.0, -0.5]]
    assert AttentionNetwork(model_config(), 3, background=False).image_logits(logits).tolist() == [[100.0, 2.0, -0.5]]


def test_attention_is_softmax_with_a_background_and_relu_without() -> None:
    logits = torch.tensor([0.0, 0.0, torch.log(torch.tensor(2.0))]).view(1, 3, 1, 1)
    softmax = AttentionNetwork(model_config(), 2, background=True).attention(logits)
    torch.testing.assert_close(softmax.flatten(), torch.tensor([0.25, 0.5]))
    assert AttentionNetwork(model_config(), 3, background=False).attention(-logits).abs().max() == 0


def names_of(network: nn.Module, layers: list[nn.Module]) -> set[str]:
    wanted = {id(parameter) for layer in layers for parameter in layer.parameters()}
    return {name for name, parameter in network.named_parameters() if id(parameter) in wanted}


def test_new_layers_are_all_but_the_backbone() -> None:
    attention = AttentionNetwork(model_config(head_channels=5), 3, background=True)
    assert names_of(attention, attention.new_layers()) == {
        name for name, _ in attention.named_parameters() if not name.startswith("backbone.")
    }
    for skip in (0, 8):
        segmenter = SegmentationNetwork(model_config(), SegmentationConfig(skip_channels=skip), 3)
        assert names_of(segmenter, segmenter.new_layers()) == {
            name for name, _ in segmenter.named_parameters() if not name.startswith("backbone.")
        }


# --- frozen layers ----------------------------------------------------------------------------------------------------


def train_a_little(network: AttentionNetwork | SegmentationNetwork) -> None:
    network.train()
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1, weight_decay=0.1)
    for seed in range(2):
        optimizer.zero_grad()
        network(random_images(2, 3, 32, 32, seed=seed)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["attention", "segmentation"])
@pytest.mark.parametrize(("freeze_backbone", "freeze_batch_norm"), [(True, True), (False, True), (False, False)])
def test_frozen_layers_stay_bit_identical(kind: str, freeze_backbone: bool, freeze_batch_norm: bool) -> None:
    config = model_config(freeze_backbone=freeze_backbone, freeze_batch_norm=freeze_batch_norm, head_channels=4)
    network: AttentionNetwork | SegmentationNetwork
    if kind == "attention":
        network = AttentionNetwork(config, 2, background=True)
    else:
        network = SegmentationNetwork(config, SegmentationConfig(aspp_dilations=(1,), skip_channels=4), 2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    frozen_norms = ("backbone.", "neck.")  # not those of the segmentation network's decoder
    norms = {name for name, part in network.named_modules() if isinstance(part, nn.BatchNorm2d)}
    norms = {name for name in norms if name.startswith(frozen_norms)}
    train_a_little(network)
    network.eval().train()  # a detour must not thaw anything
    train_a_little(network)
    for name, value in network.state_dict().items():
        is_norm = name.rpartition(".")[0] in norms
        frozen = (
            name.startswith("standardize.")
            or (freeze_batch_norm and is_norm)
            or (name.startswith("backbone.") and freeze_backbone)
        )
        assert torch.equal(value, before[name]) == frozen, name


def test_frozen_backbone_gets_standardised_features() -> None:
    network = AttentionNetwork(model_config(freeze_backbone=True), 2, background=False).eval()
    assert isinstance(network.standardize, nn.BatchNorm2d) and not list(network.standardize.parameters())
    assert isinstance(AttentionNetwork(model_config(), 2, background=False).standardize, nn.Identity)


# --- the student's start ----------------------------------------------------------------------------------------------


def make_teacher(background: bool, **settings: object) -> AttentionNetwork:
    torch.manual_seed(3)
    teacher = AttentionNetwork(model_config(**settings), 3, background)
    alive(teacher)
    return teacher


@pytest.mark.parametrize("settings", [{}, {"head_channels": 6}, {"freeze_backbone": True}])
def test_student_of_an_eps_teacher_starts_as_the_same_function(settings: dict[str, object]) -> None:
    teacher = make_teacher(True, **settings)
    student = with_background(teacher)
    assert same_weights(student, teacher)
    images = random_images(2, 3, 32, 40)
    assert torch.equal(student.eval()(images), teacher(images))


def test_student_of_a_plain_teacher_starts_with_a_background_logit_of_zero() -> None:
    teacher = make_teacher(False)
    student = with_background(teacher).eval()
    images = random_images(2, 3, 32, 40)
    logits = student(images)
    assert logits.shape == (2, 4, 4, 5) and logits[:, 0].abs().max() == 0
    torch.testing.assert_close(logits[:, 1:], teacher(images), rtol=1e-5, atol=1e-6)
    # Where every class logit is negative, the strongest map is the background.
    negative = (logits[:, 1:] < 0).all(dim=1)
    assert bool((logits.argmax(dim=1)[negative] == 0).all())


def test_student_shares_nothing_with_its_teacher() -> None:
    teacher = make_teacher(True)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    train_a_little(with_background(teacher))
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


# --- the segmentation network -----------------------------------------------------------------------------------------


def test_segmentation_network_sums_its_branches() -> None:
    config = SegmentationConfig(aspp_dilations=(1, 3))
    network = SegmentationNetwork(model_config(), config, 2).eval()
    for branch in network.aspp:
        nn.init.zeros_(branch.weight)  # type: ignore[arg-type]
        nn.init.constant_(branch.bias, 1.5)  # type: ignore[arg-type]
    logits = network(random_images(1, 3, 32, 48))
    assert logits.shape == (1, 3, 4, 6) and bool((logits == 3.0).all())


def test_torchvisions_deeplabv3_head_on_the_same_backbone() -> None:
    config = SegmentationConfig(architecture="deeplabv3", aspp_dilations=(1, 2))
    network = SegmentationNetwork(model_config(), config, 3).eval()
    logits = network(random_images(2, 3, 32, 40))
    assert logits.shape == (2, 4, 4, 5)
    assert len(network.aspp[0].convs) == 4  # a 1x1 convolution, the two dilated ones, the pooled branch
    assert not torch.equal(logits[0], logits[1])


def test_segmentation_weights_are_refused_unless_allowed(tmp_path: Path) -> None:
    segmenter = torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None)
    write_weights(tmp_path / "coco.safetensors", segmenter.state_dict())
    config = model_config("resnet50", weights=str(tmp_path / "coco.safetensors"))
    with pytest.raises(ConfigError, match="it has learned from pixel masks.* set allow_mask_weights=true"):
        build_backbone(config)
    backbone = build_backbone(config.model_copy(update={"allow_mask_weights": True}))
    assert torch.equal(backbone.early[0].weight, segmenter.backbone.conv1.weight)


@pytest.mark.parametrize(
    "name", ["aspp.0.weight", "scale.base.layer5.conv2d_list.0.weight", "layer5.conv2d_list.0.bias"]
)
def test_heads_of_deeplab_codes_are_known(name: str) -> None:
    assert has_segmentation_head({name: torch.ones(1)})
    assert not has_segmentation_head({"classifier.1.weight": torch.ones(1), "features.0.weight": torch.ones(1)})


def test_skip_gives_maps_at_stride_4() -> None:
    config = SegmentationConfig(aspp_dilations=(1,), skip_channels=8)
    assert SegmentationNetwork(model_config(), config, 2)(random_images(2, 3, 32, 48)).shape == (2, 3, 8, 12)
    with (
        torch.device("meta"),
        pytest.raises(ConfigError, match="'squeezenet1_0' has no features at stride 4"),
    ):
        SegmentationNetwork(model_config("squeezenet1_0"), config, 2)


# --- networks from checkpoints ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [False, True])
def test_network_is_rebuilt_from_its_checkpoint(tmp_path: Path, background: bool) -> None:
    teacher = make_teacher(background)
    path = tmp_path / "teacher.safetensors"
    write_weights(path, teacher.state_dict() | {"optimizer.0.step": torch.ones(())})
    again = load_attention_network(path, tiny_config().model, 3)
    assert again.background == background and not again.training and same_weights(again, teacher)


def test_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    write_weights(path, {"aspp.0.weight": torch.ones(1)})
    with pytest.raises(WeightsError, match="holds no attention network: it has no head.weight"):
        load_attention_network(path, tiny_config().model, 3)
    write_weights(path, make_teacher(True).state_dict())
    with pytest.raises(WeightsError, match=r"of another shape: head\.weight \(4, 96, 1, 1\) instead of"):
        load_attention_network(path, tiny_config().model, 9)
