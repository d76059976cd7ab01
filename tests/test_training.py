"""The optimisation loop: what is drawn, how it is learnt, and resuming after a kill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import TRAINING, make_samples, same_weights, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader

from smaflib.classifier import crop_saliency
from smaflib.config import TrainingConfig
from smaflib.data import load_samples, make_data
from smaflib.data.masks import MaskFiles
from smaflib.errors import ConfigError
from smaflib.maps import AttentionMaps, FusedMaps
from smaflib.models.weights import read_metadata, read_weights
from smaflib.runtime import Runtime
from smaflib.training import Batch, Batches, CropField, fit, learning_rate, load_history, make_optimizer


class TinyNetwork(nn.Module):
    """Everything whose state a training must keep: weights, statistics, dropout; 40 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))

    def new_layers(self) -> list[nn.Module]:
        return [self.head]


def tiny_network() -> TinyNetwork:
    torch.manual_seed(0)
    return TinyNetwork()


def training(**changes: object) -> TrainingConfig:
    tiny = {"crop_size": 8, "resize_range": [8, 12], "color_jitter": [0.1, 0.1, 0.1, 0.05]}
    return TrainingConfig.model_validate(TRAINING | tiny | changes)


def batches_of(config: TrainingConfig, seed: int = 0, num: int = 5) -> Batches:
    def which(sample: object, index: int, crop: object) -> dict[str, Tensor]:
        return {"index": torch.tensor(index)}

    return Batches(make_samples(num, size=(10, 12)), config, seed, which)


def label_loss(network: nn.Module) -> Callable[[Batch], dict[str, Tensor]]:
    def loss(batch: Batch) -> dict[str, Tensor]:
        logits = network(batch["image"])
        cls = nn.functional.multilabel_soft_margin_loss(logits.float().mean(dim=(2, 3)), batch["image_label"])
        return {"L_cls": cls, "L_size": 0.01 * logits.float().square().mean()}

    return loss


def equal_batches(one: Batch, other: Batch) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_batches_of_whole_images_are_squares_of_one_side_each() -> None:
    batches = batches_of(training(batch_size=3, whole_images=True, iterations=30))
    shapes = [tuple(batches[iteration]["image"].shape) for iteration in range(30)]
    assert all(shape[:2] == (3, 3) and shape[2] == shape[3] for shape in shapes)
    assert {shape[2] for shape in shapes} == {8, 9, 10, 11, 12}  # resize_range, both ends included
    assert equal_batches(batches[7], batches_of(training(batch_size=3, whole_images=True))[7])


def test_batch_depends_on_seed_and_position_alone() -> None:
    config = training(iterations=9)
    forwards, again = batches_of(config), batches_of(config)
    expected = [forwards[iteration] for iteration in range(9)]
    torch.manual_seed(123)  # torch's own state plays no part
    assert all(equal_batches(again[iteration], expected[iteration]) for iteration in (8, 3, 0))
    assert not torch.equal(batches_of(config, seed=1)[3]["image"], expected[3]["image"])
    assert not torch.equal(expected[0]["image"], expected[5]["image"])  # another crop in the next pass


@settings(max_examples=12)
@given(num=st.integers(1, 6), batch_size=st.integers(1, 4), seed=st.integers(0, 1000))
def test_every_pass_shows_every_sample_once_and_every_batch_is_full(num: int, batch_size: int, seed: int) -> None:
    batches = batches_of(training(batch_size=batch_size, iterations=3 * num), seed, num)
    drawn = torch.cat([batches[iteration]["index"] for iteration in range(3 * num)]).tolist()
    assert len(drawn) == 3 * num * batch_size
    for start in range(0, len(drawn), num):
        assert sorted(drawn[start : start + num]) == list(range(num))


def test_padding_is_the_mean_colour() -> None:
    batches = batches_of(training(crop_size=16, resize_range=[8, 8], color_jitter=[0.9, 0, 0, 0]))
    image = batches[0]["image"][0]  # the picture is 7 x 8 or less: most of the crop is padding
    assert float((image == 0).all(dim=0).float().mean()) >= 1 - 8 * 8 / 16**2
    assert image.abs().max() > 0


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_four_groups_at_rates_1_2_10_20_and_no_decay_on_biases(optimizer: str) -> None:
    network = tiny_network()
    config = TrainingConfig(optimizer=optimizer, learning_rate=0.01, weight_decay=5e-4)  # type: ignore[arg-type]
    groups = make_optimizer(network, config).param_groups  # type: ignore[arg-type]
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    described = [
        ({names[id(p)] for p in group["params"]}, round(group["lr"] / 0.01, 9), group["weight_decay"])
        for group in groups
    ]
    assert described == [
        ({"backbone.0.weight", "backbone.1.weight"}, 1, 5e-4),
        ({"backbone.0.bias", "backbone.1.bias"}, 2, 0),
        ({"head.weight"}, 10, 5e-4),
        ({"head.bias"}, 20, 0),
    ]
    assert all(group.get("momentum", 5e-4) == 5e-4 for group in groups)


def rates(config: TrainingConfig, peak: float = 0.1) -> list[float]:
    return [learning_rate(config, peak, iteration) for iteration in range(config.iterations)]


def test_polynomial_schedule_by_hand() -> None:
    config = TrainingConfig(iterations=4, learning_rate=0.01, poly_power=0.9)
    expected = [0.1 * (1 - iteration / 4) ** 0.9 for iteration in range(4)]
    assert rates(config) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("iterations", [1, 2, 3, 7, 250])
def test_one_cycle_is_torchs_to_the_last_bit(iterations: int) -> None:
    config = training(iterations=iterations)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    # One step more than there are iterations: torch's scheduler steps once after the last one too.
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=iterations + 1, cycle_momentum=False)
    expected = []
    for _ in range(iterations):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(config) == expected


def test_history_is_the_mean_over_a_stretch() -> None:
    network, config = tiny_network(), training(iterations=101)  # a record for every 2 iterations
    seen: list[float] = []

    def loss(batch: Batch) -> dict[str, Tensor]:
        value = label_loss(network)(batch)["L_cls"]
        seen.append(float(value.detach()))
        return {"L_cls": value}

    history = fit(network, batches_of(config), loss, Runtime())  # type: ignore[arg-type]
    assert [record["iteration"] for record in history] == [*range(2, 101, 2), 101]
    assert history[1]["L_cls"] == pytest.approx(sum(seen[2:4]) / 2)
    assert history[-1]["L_cls"] == pytest.approx(seen[100])  # the last stretch is one iteration long


class Killed(Exception):
    """Stands for a kill."""


def minute_per_step(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A clock for fit: a minute for each item that the test appends to this list."""
    steps: list[int] = []
    monkeypatch.setattr("smaflib.training.time", SimpleNamespace(monotonic=lambda: 60.0 * len(steps)))
    return steps


SGD, PLAIN_SGD, ADAMW = ("sgd", "poly", 0.9), ("sgd", "poly", 0.0), ("adamw", "onecycle", 0.0)


@pytest.mark.parametrize(
    ("optimizer", "schedule", "momentum", "iterations", "minutes", "killed_at"),
    [
        (*PLAIN_SGD, 9, 3, [2, 7]),  # before the first checkpoint, and between two
        (*SGD, 9, 3, [3, 4, 8]),  # right after a checkpoint, and again, and again
        (*ADAMW, 102, 25, [40]),  # records every 2 iterations, so the checkpoint at 25 holds half a mean
    ],
)
def test_killed_training_resumes_as_if_nothing_had_happened(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
    schedule: str,
    momentum: float,
    iterations: int,
    minutes: int,
    killed_at: list[int],
) -> None:
    config = training(
        iterations=iterations,
        checkpoint_minutes=minutes,
        optimizer=optimizer,
        schedule=schedule,
        momentum=momentum,
        head_multiplier=3,
        bias_multiplier=2,
        start_share=0.25,
    )
    whole, undisturbed = tiny_network(), tmp_path / "undisturbed.safetensors"
    expected = fit(whole, batches_of(config), label_loss(whole), Runtime(), undisturbed)  # type: ignore[arg-type]

    steps, path = minute_per_step(monkeypatch), tmp_path / "net.safetensors"
    for kill in [*killed_at, None]:
        network = tiny_network()
        inner, start = label_loss(network), int(read_metadata(path)["iteration"]) if path.is_file() else 0
        calls = iter(range(start, iterations))

        def loss(batch: Batch, inner=inner, calls=calls, kill=kill) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
            if next(calls) == kill:
                raise Killed
            steps.append(1)
            return inner(batch)

        if kill is None:
            history = fit(network, batches_of(config), loss, Runtime(), path)  # type: ignore[arg-type]
        else:
            with pytest.raises(Killed):
                fit(network, batches_of(config), loss, Runtime(), path)  # type: ignore[arg-type]
            assert path.is_file() == (kill >= minutes)
    assert start == {7: 6, 8: 6, 40: 25}[killed_at[-1]]
    assert same_weights(network, whole)
    assert history == expected == load_history(path)
    assert path.read_bytes() == undisturbed.read_bytes()


def test_a_share_of_the_start_is_kept_in_the_end(tmp_path: Path) -> None:
    start, ends = tiny_network().state_dict(), {}
    for share in (0.0, 0.25, 1.0):
        network = tiny_network()
        config = training(start_share=share)
        fit(network, batches_of(config), label_loss(network), Runtime(), tmp_path / f"{share}.safetensors")  # type: ignore[arg-type]
        ends[share] = network.state_dict()
        kept = read_weights(tmp_path / f"{share}.safetensors")
        assert all(torch.equal(kept[name], value) for name, value in ends[share].items())
    moved = [name for name in start if not torch.equal(start[name], ends[0.0][name])]
    assert {name.rpartition(".")[2] for name in moved} >= {"weight", "bias"}
    for name, _ in network.named_parameters():
        assert torch.allclose(ends[0.25][name], 0.75 * ends[0.0][name] + 0.25 * start[name], atol=1e-7)
        assert torch.equal(ends[1.0][name], start[name])


def test_checkpoint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path, config, network = tmp_path / "net.safetensors", training(), tiny_network()
    fit(network, batches_of(config), label_loss(network), Runtime(), path)  # type: ignore[arg-type]
    network.head = nn.Conv2d(4, 7, 1)
    with pytest.raises(ConfigError, match=r"size mismatch for head\.bias"):
        fit(network, batches_of(config), label_loss(network), Runtime(), path)  # type: ignore[arg-type]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConfigError, match="not a complete safetensors file"):
        fit(tiny_network(), batches_of(config), label_loss(network), Runtime(), path)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_stops_before_it_ruins_the_weights(tmp_path: Path, bad: float) -> None:
    network = tiny_network()
    before = {name: value.clone() for name, value in network.named_parameters()}
    path = tmp_path / "net.safetensors"

    def loss(batch: Batch) -> dict[str, Tensor]:
        return {"L_good": network(batch["image"]).mean() * 0 + 2, "L_bad": network(batch["image"]).mean() * bad}

    with pytest.raises(FloatingPointError, match=r"no longer finite \(.*'L_good': 2\.0.*lower the learning rate"):
        fit(network, batches_of(training()), loss, Runtime(), path)  # type: ignore[arg-type]
    assert all(torch.equal(parameter, before[name]) for name, parameter in network.named_parameters())
    assert not path.exists()


def test_bf16_autocast_trains_float32_weights() -> None:
    network, kinds = tiny_network(), set()

    def loss(batch: Batch) -> dict[str, Tensor]:
        kinds.add(network(batch["image"]).dtype)
        return label_loss(network)(batch)

    history = fit(network, batches_of(training()), loss, Runtime(torch.device("cpu"), "bf16"))  # type: ignore[arg-type]
    assert kinds == {torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())
    assert len(history) == 4 and all(record["L_cls"] < 2 for record in history)
    other = tiny_network()
    fit(other, batches_of(training()), label_loss(other), Runtime())  # type: ignore[arg-type]
    assert not same_weights(network, other)


def test_loader_processes_can_be_spawned(tmp_path: Path) -> None:
    """macOS and Windows spawn them, Linux from Python 3.14 on: what a data set holds must be picklable."""
    config = tiny_config(data={"num_train": 4, "num_val": 1, "image_size": 64, "root": tmp_path / "data"})
    make_data(config, tmp_path)
    samples = load_samples(config, "train").with_saliency()
    masks = MaskFiles([files.mask for files in samples.files if files.mask])
    maps = FusedMaps(AttentionMaps(tmp_path / "cams", (1.0,)), samples)
    for sample in samples:
        maps.maps.write(sample.image_id, [torch.rand(6, 4, 4)], (64, 64))
    fields = (crop_saliency, CropField("mask", masks, "nearest", 255), CropField("denoised", maps))
    batches = ConcatDataset([Batches(samples, training(iterations=1), 0, field) for field in fields])
    loader = DataLoader(batches, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert [equal_batches(loaded, batches[number]) for number, loaded in enumerate(loader)] == [True] * 3
