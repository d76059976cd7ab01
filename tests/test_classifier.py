"""Stage 1: the two losses, training, and the statistics of frozen features."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers import make_samples, new_teacher, same_weights, tiny_config, train_teacher
from torch import Tensor

from smaflib.classifier import classification_loss, classification_scores, classify, saliency_loss, standardize_features
from smaflib.config import ClassifierConfig, Config
from smaflib.data.transforms import normalize
from smaflib.data.views import views_of
from smaflib.models import load_attention_network
from smaflib.runtime import Runtime
from smaflib.training import Batches, load_history

CPU = Runtime(seed=0)


def eps_config(tau: float = 0.5, weight: float = 0.5) -> ClassifierConfig:
    return ClassifierConfig(eps_tau=tau, eps_lambda=weight)


# --- L_sal ------------------------------------------------------------------------------------------------------------


def certain_logits(argmax_labels: list[list[int]], channels: int = 3) -> Tensor:
    """(1, channels, h, w) logits whose softmax is 1 for the given channel of each pixel, background first."""
    return torch.nn.functional.one_hot(torch.tensor([argmax_labels]), channels).permute(0, 3, 1, 2).float() * 100


@pytest.mark.parametrize(
    ("argmax_labels", "label", "saliency", "weight", "expected"),
    [
        # Class 1 covers the salient pixel, background the other: explained.
        ([[1, 0]], [1, 0], [[1, 0]], 0.5, 0),
        # Background everywhere, class without area: estimate 0, one of two pixels is wrong by 1.
        ([[0, 0]], [1, 0], [[1, 0]], 0.5, 1 / 2),
        # A class without label is neither foreground nor background: both estimates disagree, 0.5 * 0 + 0.5 * 1.
        ([[2, 0]], [1, 0], [[1, 0]], 0.5, 1 / 8),
        ([[2, 0]], [1, 0], [[1, 0]], 0.9, 0.9**2 / 2),
        # A labelled class that lies off the saliency joins the background: estimate 0 everywhere.
        ([[0, 1]], [1, 0], [[1, 0]], 0.5, 1 / 2),
        # Half of the class lies on the saliency, which is not more than tau = 0.5: background, too.
        ([[1, 1]], [1, 0], [[1, 0]], 0.5, 1 / 2),
    ],
)
def test_saliency_loss_by_hand(
    argmax_labels: list[list[int]], label: list[int], saliency: list[list[int]], weight: float, expected: float
) -> None:
    config = eps_config(tau=0.5, weight=weight)
    given_saliency = torch.tensor([saliency]).float()
    loss = saliency_loss(certain_logits(argmax_labels), given_saliency, torch.tensor([label]).float(), config)
    assert float(loss) == pytest.approx(expected, abs=1e-6)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pretraining", "losses"), [("plain", {"L_cls"}), ("eps", {"L_cls", "L_sal"})])
def test_classifier_trains_with_the_losses_of_its_kind(pretraining: str, losses: set[str], tmp_path: Path) -> None:
    config = tiny_config(classifier={"pretraining": pretraining})
    samples = make_samples(saliency=pretraining == "eps", ground_truth=False)
    path = tmp_path / "teacher.safetensors"
    network, history = train_teacher(samples, config, CPU, path)
    assert network.background == (pretraining == "eps") and not network.training
    assert history[0].keys() == losses | {"iteration"} and len(history) == 4
    again, same_history = train_teacher(samples, config, CPU, path)
    assert same_weights(again, network) and same_history == history
    assert not same_weights(train_teacher(samples, config, Runtime(seed=1))[0], network)


def test_classifier_learns_three_colours() -> None:
    samples = make_samples(6, saliency=False)
    config = tiny_config(classifier={"iterations": 40, "batch_size": 6, "learning_rate": 0.02})
    network, _ = train_teacher(samples, config, CPU)
    logits = classify(network, samples, CPU)
    assert logits.shape == (6, 3)
    assert torch.equal(logits.argmax(dim=1), samples.image_labels.argmax(dim=1))


# --- frozen backbones -------------------------------------------------------------------------------------------------


def test_standardised_features_have_mean_0_and_variance_1() -> None:
    config = tiny_config(model={"freeze_backbone": True})
    network, batches = new_teacher(config, 3, CPU), Batches(make_samples(3), config.classifier, seed=0)
    standardize_features(network, batches, CPU)
    measured = -(-2 * 3 // config.classifier.batch_size)  # two passes over three samples, rounded up to whole batches
    with torch.no_grad():
        crops = torch.cat([batches[index]["image"] for index in range(min(measured, len(batches)))])
        features = network.standardize(network.backbone(crops)).transpose(0, 1).flatten(1)  # (C, pixels)
    raw = network.standardize.running_var > 1e-4  # a channel that is constant stays 0
    assert bool(raw.any())
    torch.testing.assert_close(features.mean(dim=1), torch.zeros(len(features)), rtol=0, atol=1e-3)
    variance = features.var(dim=1, correction=0)[raw]
    torch.testing.assert_close(variance, torch.ones_like(variance), rtol=0, atol=0.11)  # BatchNorm adds 1e-5 below


def solved_config() -> Config:
    solver = {"iterations": 200, "weight_decay": 1e-3}
    return tiny_config(model={"freeze_backbone": True}, classifier={"solve_head": solver})


def test_solved_head_is_the_minimum_of_the_loss_over_whole_images() -> None:
    config, samples = solved_config(), make_samples(6, saliency=False)
    network, history = train_teacher(samples, config, CPU)
    network.head.weight.requires_grad_(True).grad = None
    # The loss, built once more from the network's own logit maps: L_cls over images, scales and flips, and the penalty.
    losses = []
    for sample in samples:
        for scale in config.attention.scales:
            picture = views_of(sample.image, [scale])[0][None]
            for view in (picture, picture.flip(-1)):
                logits = network.image_logits(network(view))
                losses.append(classification_loss(logits, sample.image_label[None]))
    loss = torch.stack(losses).mean()
    penalty = 1e-3 * network.head.weight.square().sum(dim=(1, 2, 3)).mean()
    assert loss.item() == pytest.approx(history[-1]["L_cls"], rel=1e-2)
    assert loss.item() < math.log(2) / 2  # better than knowing nothing
    (gradient,) = torch.autograd.grad(loss + penalty, [network.head.weight], retain_graph=True)
    (at_zero,) = torch.autograd.grad(penalty, [network.head.weight])
    assert float(gradient.norm()) < 0.05 * float(at_zero.norm())


def test_solved_head_leaves_the_backbone_alone_and_is_stored(tmp_path: Path) -> None:
    config, samples = solved_config(), make_samples(4, saliency=False)
    path = tmp_path / "teacher.safetensors"
    network, history = train_teacher(samples, config, CPU, path)
    assert same_weights(network.backbone, new_teacher(config, 3, CPU).backbone)
    assert same_weights(load_attention_network(path, config.model, 3), network)
    assert load_history(path) == history and history[0]["penalty"] == 0
    assert same_weights(train_teacher(samples, config, CPU)[0], network)
    # What is complete is loaded: other images would give another head.
    again, same_history = train_teacher(make_samples(2, saliency=False), config, CPU, path)
    assert same_weights(again, network) and same_history == history
    # A student of ImageNet's maps starts from the same head, not from a random one.
    given = config.model_copy(update={"attention": config.attention.model_copy(update={"source": "imagenet"})})
    assert same_weights(train_teacher(samples, given, CPU)[0], network)


# --- a finished teacher -----------------------------------------------------------------------------------------------


def test_finished_teacher_is_loaded_and_not_trained(tmp_path: Path) -> None:
    trained, _ = train_teacher(make_samples(3), tiny_config(), CPU, tmp_path / "other.safetensors")
    config = tiny_config(classifier={"checkpoint": tmp_path / "other.safetensors", "pretraining": "eps"})
    network, history = train_teacher(make_samples(3), config, CPU, tmp_path / "teacher.safetensors")
    assert same_weights(network, trained) and history == []
    assert same_weights(load_attention_network(tmp_path / "teacher.safetensors", config.model, 3), trained)


# --- classify ---------------------------------------------------------------------------------------------------------


def test_classify_takes_whole_images_in_order() -> None:
    samples = make_samples(3)
    network = new_teacher(tiny_config(), 3, CPU)
    logits = classify(network, samples, CPU)
    assert not network.training
    with torch.no_grad():
        alone = network(normalize(samples[2].image)[None]).mean(dim=(2, 3))[0]
    torch.testing.assert_close(logits[2], alone)
    rough = classify(network, samples, Runtime(torch.device("cpu"), "bf16"))
    assert rough.dtype == torch.float32 and not torch.equal(rough, logits)
    torch.testing.assert_close(rough, logits, rtol=0.1, atol=0.1)


def test_classification_scores_by_hand() -> None:
    logits = torch.tensor([[2.0, -1.0, -1.0], [1.0, 3.0, -1.0], [-1.0, -2.0, -1.0]])
    labels = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    records = classification_scores(logits, labels, ("cat", "dog", "cow"))
    values = {(record["metric"], record["class_name"]): record["value"] for record in records}
    assert values["precision", "cat"] == 0.5 and values["precision", "dog"] == 1
    assert values["recall", "cat"] == 0.5 and values["recall", "dog"] == 1
    assert math.isnan(values["precision", "cow"]) and math.isnan(values["recall", "cow"])  # never found, never there
    assert values["precision", "mean"] == values["recall", "mean"] == 0.75
    assert values["accuracy", "mean"] == pytest.approx(1 / 3)
    assert len(records) == 9
