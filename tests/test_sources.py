"""Sources of attention maps: one interface, several networks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minidata import CLASS_NAMES
from smaflib.cams import multi_scale_cams
from smaflib.config import AttentionConfig, SourceOptions
from smaflib.data.classes import VOC_CLASSES
from smaflib.data.prepare import make_data
from smaflib.data.views import views_of
from smaflib.errors import ConfigError
from smaflib.models.networks import AttentionNetwork
from smaflib.models.pretrained import pretrained_network
from smaflib.pipeline import self_train_rounds, train_teacher, write_maps, write_masks
from smaflib.sources import Attention, AttentionSource, NetworkSource, make_source
from smaflib.sources.gradcam import METHODS, GradCamSource
from smaflib.sources.imagenet import (
    TEMPERATURE,
    ImageNetAndNetwork,
    ImageNetClassifier,
    ImageNetSource,
    match_classes,
)
from smaflib.sources.vit import VitSource
from smaflib.workspace import Workspace
from tests.helpers import PixelNetwork, tiny_config

IMAGE = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def classifier() -> ImageNetClassifier:
    return ImageNetClassifier()


# --------------------------------------------------------------------------------------------- names of ImageNet


NAMES = {
    "dog": 118,  # by the table: a beagle is not called dog
    "hot dog": 1,  # a synonym of one class, not the end of another
    "fox": 4,  # the last word of "red fox" and others
    "Zebras": 1,
    "strawberries": 1,
    "tv_monitor": 2,
    "lesser-panda": 1,
    "skis": 0,
    "unicorn": 0,
}


@pytest.mark.parametrize("name", NAMES)
def test_names_match_classes_of_imagenet(name: str) -> None:
    assert len(match_classes([name])[name]) == NAMES[name]


def test_all_classes_of_voc_are_matched() -> None:
    found = match_classes(VOC_CLASSES)
    assert all(found.values()) and len(found["person"]) == 55  # jeans, suits, a diver
    assert match_classes(["mug"], {"mug": [3]}) == {"mug": (3,)}


REFUSED = {
    "no name of imagenet": (["quilk", "zebr"], {}, r"none of these classes .*zebr \(nearest: zebra"),
    "a number outside": (["cat"], {"cat": [1000]}, "numbers 0 to 999: cat: 1000"),
    "an unknown class": (["cat"], {"dog": [1]}, "dog: no such class here"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_classes_that_do_not_fit_imagenet_are_refused(what: str) -> None:
    names, numbers, message = REFUSED[what]
    options = SourceOptions(class_numbers={name: tuple(each) for name, each in numbers.items()})
    with pytest.raises(ConfigError, match=message):
        make_source(AttentionConfig(source="imagenet", options=options), names, None)


def test_unmatched_names_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    make_source(AttentionConfig(source="imagenet"), ["cat", "giraffe", "zebar"], None)
    assert "ImageNet knows 1 of 3 classes, not giraffe" in (said := capsys.readouterr().out)
    assert "zebar (nearest: zebra" in said


# ----------------------------------------------------------------------------------------------------- ImageNet


def test_a_class_is_the_mean_of_its_members_by_their_probability(classifier: ImageNetClassifier) -> None:
    logits = torch.full((1, 1000), -50.0)
    logits[0, [281, 282]] = torch.tensor([10.0, 10 + TEMPERATURE * math.log(3)])
    source = ImageNetSource(classifier, [(281, 282), (340,), ()])
    shares = source.shares(logits, source.members)[0]
    assert shares[0, [281, 282]].tolist() == pytest.approx([0.25, 0.75])
    assert shares[1, 340] == 1 and shares[2].sum() == 0


def test_a_cell_speaks_for_a_class_against_what_else_the_image_may_show(classifier: ImageNetClassifier) -> None:
    source, classes = ImageNetSource(classifier, [(281, 282), (340,), ()]), [[0, 1, 2]]
    images = views_of(IMAGE, [1.0])[0][None]
    with torch.no_grad():
        logits, maps = classifier(images), source.attend(images, classes).maps  # with the bias
    likely = logits.mean(dim=(2, 3))[0] / TEMPERATURE
    for members, found in zip(([281, 282], [340]), maps[0], strict=False):
        rest = [number for number in range(1000) if number not in members]
        mean, others = (likely[n].softmax(0) @ logits[0, n].flatten(1) for n in (members, rest))
        torch.testing.assert_close(found.flatten(), (mean - others).relu(), rtol=1e-3, atol=1e-3)
    assert maps[0, 2].sum() == 0


def test_imagenet_maps_the_classes_that_it_knows_and_a_network_the_others() -> None:
    class Known(AttentionSource):
        members = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])  # of classes 0 and 2, not 1

        def attend(self, images: Tensor, classes: object) -> Attention:
            return Attention(torch.tensor([4.0, 0.0, 9.0]).view(1, 3, 1, 1))  # one cell, where the network has two

    red_green_blue = PixelNetwork(torch.eye(3), stride=2)
    image = torch.tensor([[255, 0], [153, 51], [0, 255]], dtype=torch.uint8)[:, None].repeat(1, 2, 1)
    image = image.repeat_interleave(2, dim=2)  # cells of 2 x 2 pixels: (1, 0.6, 0) and (0, 0.2, 1)
    source = ImageNetAndNetwork(Known(), red_green_blue)  # type: ignore[arg-type]
    maps = source(image, [0, 1, 2]).maps
    torch.testing.assert_close(maps, torch.tensor([[[4.0, 4.0]], [[0.6, 0.2]], [[9.0, 9.0]]]), rtol=0, atol=1e-5)
    red_green_blue.forward = None  # type: ignore[assignment]  # is not called for classes that ImageNet knows
    assert source(image, [0, 2]).maps.flatten().tolist() == [4.0, 9.0]


def test_without_any_name_of_imagenet_the_network_maps_all(tmp_path: Path) -> None:
    attention, network = AttentionConfig(source="imagenet+classifier"), PixelNetwork(torch.eye(3))
    only = make_source(attention, ["giraffe", "unicorn"], network)
    assert isinstance(only, NetworkSource) and only.network is network
    assert isinstance(make_source(attention, ["giraffe", "zebra"], network), ImageNetAndNetwork)

    config = tiny_config(attention={"source": "imagenet+classifier"}, data={"num_train": 2, "num_val": 1})
    work = Workspace(tmp_path, config)
    make_data(config, tmp_path)
    work.path("checkpoints").mkdir()
    for name in ("teacher", "student"):
        trained = AttentionNetwork(config.model, len(CLASS_NAMES), background=name == "student")
        save_file(trained.state_dict(), work.checkpoint(name))
        assert isinstance(work.source(name), ImageNetAndNetwork)  # ImageNet has llamas


# ----------------------------------------------------------------------------------------------------- Grad-CAM


@pytest.mark.parametrize("method", METHODS)
def test_gradcam_of_all_classes_in_one_pass_is_the_packages(classifier: ImageNetClassifier, method: str) -> None:
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    source, numbers = GradCamSource.of_classifier(classifier, method), [281, 340, 963]
    passes = []
    with classifier.model.register_forward_hook(lambda *call: passes.append(1)):
        maps = source(IMAGE, numbers).maps
    assert len(passes) == 1

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = classifier

        def forward(self, images: Tensor) -> Tensor:
            logits = classifier(images)
            return logits.mean(dim=(2, 3)) * logits.shape[2:].numel()

    (view,) = views_of(IMAGE, [1.0])
    cam, made = getattr(pytorch_grad_cam, METHODS[method])(Logits(), [classifier.features]), []
    compute = cam.get_cam_image
    cam.get_cam_image = lambda *given: made.append(compute(*given)) or made[-1]
    for found, number in zip(maps, numbers, strict=True):
        cam(view[None], [ClassifierOutputTarget(number)])
        torch.testing.assert_close(found, torch.from_numpy(made[-1][0]).relu(), rtol=1e-3, atol=1e-4)
    assert maps.amax() > 0


def test_a_layer_by_name_and_one_that_is_not_there() -> None:
    network = pretrained_network("student")
    names = list("abcdef")
    finer = AttentionConfig(source="layercam", options=SourceOptions(layer="backbone"))
    assert make_source(finer, names, network)(IMAGE, [1]).maps.shape == (1, 8, 12)


# -------------------------------------------------------------------------------------------------- transformers


def tiny_vit() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, depth=3)
    return model.eval()


def test_attention_of_a_transformer_is_the_share_that_its_values_get() -> None:
    """Without a fused kernel the model gives the same features, so what was read is what it uses."""
    model = tiny_vit()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        fused = model.forward_features(images)  # type: ignore[operator]
        source = VitSource(model, 2, rollout=False)
        earlier = source.attentions(images)
        torch.testing.assert_close(model.forward_features(images), fused, rtol=1e-4, atol=1e-5)  # type: ignore
    assert [tuple(each.shape) for each in earlier] == [(1, 25, 25), (1, 25, 25), (1, 3, 25, 25)]
    torch.testing.assert_close(earlier[-1].sum(dim=-1), torch.ones(1, 3, 25))
    heads = earlier[-1][0, :, 0, 1:]
    with torch.no_grad():
        maps, affinity = source.attend(images, [[1]])
        one = VitSource(model, 2, rollout=False, head=2).attend(images, [[1]]).maps
    torch.testing.assert_close(maps[0, 1].flatten(), heads.mean(dim=0) / heads.mean(dim=0).max())
    torch.testing.assert_close(one[0, 1].flatten(), heads[2] / heads[2].max())
    assert (maps[0, 0] == 0).all()
    assert affinity is not None and affinity.shape == (1, 24, 24)


def test_rollout_multiplies_blocks_with_half_of_each_token_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    source = VitSource(tiny_vit(), 1, rollout=True)
    a = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    b = torch.tensor([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    monkeypatch.setattr(source, "attentions", lambda images: [a[None], b[None, None]])
    maps = source.attend(torch.zeros(1, 3, 16, 32), [[0]]).maps
    # (I + b) / 2 times (I + a) / 2: the class token keeps 3/8, gives 3/8 to the first patch and 1/4 to the second.
    torch.testing.assert_close(maps[0, 0], torch.tensor([[1.0, 2 / 3]]))


def test_weights_of_another_transformer_a_missing_head_and_a_network_without_blocks(tmp_path: Path) -> None:
    file = tmp_path / "small.safetensors"
    save_file(tiny_vit().state_dict(), file)
    options = SourceOptions(model="vit_small_patch16_224", weights=str(file))
    with pytest.raises(ConfigError, match="do not fit timm/vit_small_patch16_224"):
        make_source(AttentionConfig(source="vit", options=options), ["a"], None)
    with pytest.raises(ConfigError, match="no vision transformer with a class token"):
        VitSource(nn.Conv2d(3, 3, 1), 1, rollout=False)
    pickled = tmp_path / "evil.pth"
    torch.save({"layer.weight": torch.zeros(1), "run": print}, pickled)
    options = SourceOptions(model="vit_tiny_patch16_224", weights=str(pickled))
    with pytest.raises(ConfigError, match="not a complete PyTorch checkpoint"):
        make_source(AttentionConfig(source="dino", options=options), ["a"], None)


# ------------------------------------------------------------------------------------------------------ together


def test_maps_of_an_image_are_called_for_by_class_and_scale() -> None:
    source = NetworkSource(pretrained_network("teacher"))
    maps, affinity = source(IMAGE, [5, 0], scale=2.0)
    (whole,) = multi_scale_cams(source, IMAGE, [2.0], flip=False)
    torch.testing.assert_close(maps, whole[[5, 0]])
    assert affinity is None
    with pytest.raises(ValueError, match="affinity of patches, which NetworkSource does not know"):
        multi_scale_cams(source, IMAGE, [1.0], caa=0.4)


def test_a_source_that_makes_maps_of_the_classes_asked_for_must_be_told_them(classifier: ImageNetClassifier) -> None:
    for source in (GradCamSource.of_classifier(classifier, "gradcam"), VitSource(tiny_vit(), 1, rollout=False)):
        with pytest.raises(ValueError, match=r"pass classes=\[0\]"):
            multi_scale_cams(source, IMAGE, [1.0])
    (cam,) = multi_scale_cams(source, IMAGE, [1.0], classes=[])  # an image of nothing
    assert not cam.any()


@pytest.mark.parametrize("source", ["imagenet", "xgradcam"])
def test_a_student_learns_from_a_source(source: str, tmp_path: Path) -> None:
    """The whole chain; with ImageNet's classes no teacher is trained."""
    data = {"num_train": 3, "num_val": 1, "image_size": 64}
    numbers = {name: [*range(first, 1000, len(CLASS_NAMES))] for first, name in enumerate(CLASS_NAMES)}
    options = {"class_numbers": numbers}
    attention = {"source": source, "options": options if source == "imagenet" else {}, "scales": [1.0]}
    config = tiny_config(data=data, attention=attention, classifier={"pretraining": "plain"})
    make_data(config, tmp_path)
    work = Workspace(tmp_path, config)
    _, history = train_teacher(work)
    assert (history == []) == (source == "imagenet")
    assert work.source("teacher").supervision == config.supervision
    write_maps(work, "teacher")
    self_train_rounds(work)
    assert len(write_masks(work)) == len(work.samples())
    maps = [work.maps("teacher").read(name)[0][0] for name in work.samples().image_ids]
    shown = work.samples().image_labels.bool()
    assert any(bool(cam[label].any()) for cam, label in zip(maps, shown, strict=True))
    if source == "xgradcam":  # gradients are taken of the classes that are asked for
        assert all(bool((cam[~label] == 0).all()) for cam, label in zip(maps, shown, strict=True))
