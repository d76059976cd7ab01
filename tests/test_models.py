"""The networks: logit maps, frozen layers, the student's start, checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import generator, same_weights, tiny_config
from torch import Tensor, nn

from smaflib.config import ModelConfig, SegmentationConfig
from smaflib.errors import ConfigError
from smaflib.models import AttentionNetwork, SegmentationNetwork, with_background
from smaflib.models.networks import load_attention_network
from smaflib.models.weights import write_weights


def model_config(backbone: str = "slim", **settings: object) -> ModelConfig:
    return ModelConfig.model_validate({"backbone": backbone} | settings)


def random_images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


# --- the attention network --------------------------------------------------------------------------------------------


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


# --- frozen layers ----------------------------------------------------------------------------------------------------


def train_a_little(network: AttentionNetwork | SegmentationNetwork) -> None:
    network.train()
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1, weight_decay=0.1)
    for seed in range(2):
        optimizer.zero_grad()
        network(random_images(2, 3, 32, 32, seed=seed)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("backbone", ["slim", "timm/test_efficientnet"])
@pytest.mark.parametrize("kind", ["attention", "segmentation"])
@pytest.mark.parametrize(("freeze_backbone", "freeze_batch_norm"), [(True, True), (False, True), (False, False)])
def test_frozen_layers_stay_bit_identical(
    backbone: str, kind: str, freeze_backbone: bool, freeze_batch_norm: bool
) -> None:
    options = {"freeze_backbone": freeze_backbone, "freeze_batch_norm": freeze_batch_norm, "freeze_early": True}
    config = model_config(backbone, head_channels=4, **options)
    network: AttentionNetwork | SegmentationNetwork
    if kind == "attention":
        network = AttentionNetwork(config, 2, background=True)
    else:
        network = SegmentationNetwork(config, SegmentationConfig(aspp_dilations=(1,), skip_channels=4), 2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    frozen_norms = ("backbone.", "neck.")  # not those of the segmentation network's decoder
    norms = {name for name, part in network.named_modules() if isinstance(part, nn.BatchNorm2d)}
    norms = {name for name in norms if name.startswith(frozen_norms)}
    early = {id(part) for layer in network.backbone.early_layers() for part in layer.modules()}
    in_early = {name for name, part in network.named_modules() if id(part) in early}
    train_a_little(network)
    network.eval().train()  # a detour must not thaw anything
    train_a_little(network)
    for name, value in network.state_dict().items():
        module = name.rpartition(".")[0]
        frozen = (
            name.startswith("standardize.")
            or name in ("backbone.scale", "backbone.shift")
            or module in in_early
            or (freeze_batch_norm and module in norms)
            or (name.startswith("backbone.") and freeze_backbone)
        )
        assert torch.equal(value, before[name]) == frozen, name


# --- the student's start ----------------------------------------------------------------------------------------------


def make_teacher(background: bool, **settings: object) -> AttentionNetwork:
    torch.manual_seed(3)
    return AttentionNetwork(model_config(**settings), 3, background).eval()


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


# --- networks from checkpoints ----------------------------------------------------------------------------------------


def test_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    write_weights(path, {"aspp.0.weight": torch.ones(1)})
    with pytest.raises(ConfigError, match="Missing key"):
        load_attention_network(path, tiny_config().model, 3)
    write_weights(path, make_teacher(True).state_dict())
    with pytest.raises(ConfigError, match=r"size mismatch for head\.weight"):
        load_attention_network(path, tiny_config().model, 9)
