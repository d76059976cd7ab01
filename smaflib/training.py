"""The optimisation loop of classifier, student and segmentation network.

An iteration depends on the seed and its number alone, so a killed training that resumes from its checkpoint ends with
the weights of one that was never killed.
"""

import copy
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from smaflib.config import TrainingConfig
from smaflib.data.sample import Sample
from smaflib.data.transforms import Crop, draw_crop, jitter_colors, normalize, whole_image
from smaflib.errors import ConfigError
from smaflib.models.weights import OPTIMIZER, fill, read_metadata, read_weights, write_weights
from smaflib.processes import num_ranks, rank, sum_gradients, sum_over_ranks
from smaflib.runtime import Runtime, derive_seed, memory_advice, progress, release_freed_memory, seeded

Batch = dict[str, Tensor]
Losses = Mapping[str, Tensor | float]
History = list[dict[str, float]]
"""One record per log point: ``iteration``, and the mean of each loss since the record before."""

CropFields = Callable[[Sample, int, Crop], dict[str, Tensor]]
"""(sample, its index, crop) -> fields of the batch beside image and image label, cut with the same crop."""

LOG_POINTS = 50


@dataclass(frozen=True)
class CropField:
    """A field of the batch, cut from one item per sample: a mask, or denoised maps. Picklable for loader processes."""

    name: str
    items: Sequence[Tensor]  # per sample (H, W) or (C, H, W); may be lazy
    interpolation: str = "bilinear"
    fill: float = 0  # outside the image

    def __call__(self, sample: Sample, index: int, crop: Crop) -> dict[str, Tensor]:
        return {self.name: crop.apply(self.items[index], self.interpolation, self.fill)}


class Batches(Dataset[Batch]):
    """Batch number ``iteration`` of a training, a function of seed and number: drawn, cropped, normalised.

    Every pass over the samples is a new permutation. Batches span passes, so all of them are full.
    """

    def __init__(
        self, samples: Sequence[Sample], config: TrainingConfig, seed: int, crop_fields: CropFields | None = None
    ) -> None:
        self.samples, self.config, self.seed, self.crop_fields = samples, config, seed, crop_fields
        self.part = slice(None)  # of each batch; fit sets that of its process

    def __len__(self) -> int:
        return self.config.iterations

    def loader(self, iterations: range, runtime: Runtime) -> DataLoader[Batch]:
        """Load the batches of some iterations in one pass, so that loader processes live as long as the training."""
        return DataLoader(
            self,
            batch_size=None,
            sampler=iterations,
            num_workers=runtime.num_workers,
            generator=torch.Generator(),  # else it would draw from the global generator
            pin_memory=runtime.device.type == "cuda",
        )

    def __getitem__(self, iteration: int) -> Batch:
        first = iteration * self.config.batch_size
        positions = range(first, first + self.config.batch_size)[self.part]
        drawn = [self._draw(position) for position in positions]
        return {name: torch.stack([item[name] for item in drawn]) for name in drawn[0]}

    def _draw(self, position: int) -> Batch:
        round_, place = divmod(position, len(self.samples))
        order = torch.randperm(len(self.samples), generator=_generator(self.seed, "order", round_))
        index = int(order[place])
        sample, generator = self.samples[index], _generator(self.seed, "crop", position)
        if self.config.whole_images:  # squares, of one side for the whole batch
            smallest, largest = self.config.resize_range
            sides = _generator(self.seed, "side", position // self.config.batch_size)
            side = int(torch.randint(smallest, largest + 1, (), generator=sides))
            crop = whole_image(side, self.config, generator)
        else:
            crop = draw_crop((sample.image.shape[-2], sample.image.shape[-1]), self.config, generator)
        image = jitter_colors(crop.apply(sample.image, "bicubic"), self.config.color_jitter, generator)
        # The padding is 0 after normalisation (the mean colour), as in the reference, not black before it.
        batch = {"image": crop.zero_outside(normalize(image)), "image_label": sample.image_label}
        return batch | (self.crop_fields(sample, index, crop) if self.crop_fields else {})


def fit(
    network: nn.Module,
    batches: Batches,  # the data, the seed and the settings
    loss: Callable[[Batch], dict[str, Tensor]],  # from a batch on the runtime's device to named losses; summed
    runtime: Runtime,
    checkpoint: Path | None = None,  # written every checkpoint_minutes and at the end
    stage: str = "training",  # name of the settings
    num_terms: Callable[[Batch], Tensor] | None = None,  # that a batch's losses are the mean of; None: its images
) -> History:
    """Optimise a network in place; it ends in eval mode. A killed training resumes from its checkpoint.

    Layers in the network's ``new_layers()`` learn at ``head_multiplier`` times the rate. A resumed training with
    ``start_share`` needs the initial weights of the first time. Several processes (:mod:`smaflib.processes`) compute a
    part of each batch and take the same steps as one.

    FloatingPointError if a loss is not finite; on a GPU losses are read when they are logged or saved. ConfigError if
    memory runs out, or several processes cannot share batch norm.
    """
    config, batches = batches.config, copy.copy(batches)
    batches.part = slice(rank(), None, num_ranks())
    runtime.place(network).train()
    check_batch_norm(network, num_ranks(), runtime.device)
    if num_ranks() > 1 and runtime.device.type == "cuda":
        # torch's own conversion would lose the activations inside of timm's layers.
        from timm.layers import convert_sync_batchnorm  # type: ignore[attr-defined]

        network = convert_sync_batchnorm(network)
    initial = [parameter.detach().clone() for parameter in network.parameters()] if config.start_share else []
    optimizer = make_optimizer(network, config)
    start, history, losses = _resume(network, optimizer, checkpoint)
    if start >= config.iterations:
        network.eval()
        return history
    peaks = [group["lr"] for group in optimizer.param_groups]
    loader = batches.loader(range(start, config.iterations), runtime)
    advice = f"lower {stage}.batch_size or {stage}.{'resize_range' if config.whole_images else 'crop_size'}"
    log_every, saved = max(1, config.iterations // LOG_POINTS), time.monotonic()
    for done, batch in enumerate(progress(loader, config.iterations - start, stage), start=start + 1):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = learning_rate(config, peak, done - 1)
        # Each process has other images, so it draws other dropout masks.
        with seeded(derive_seed(batches.seed, "dropout", done - 1) + rank(), runtime.device), memory_advice(advice):
            losses.append(_step(network, optimizer, batch, loss, runtime, num_terms))
        if done % log_every == 0 or done == config.iterations:
            steps = _numbers(losses)
            means = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
            history.append({"iteration": float(done)} | means)
            losses = []
        is_due = done < config.iterations and time.monotonic() - saved >= 60 * config.checkpoint_minutes
        if checkpoint and is_due and rank() == 0:
            _save_unfinished(checkpoint, network, optimizer, iteration=done, history=history, losses=_numbers(losses))
            saved = time.monotonic()
    network.eval()
    with torch.no_grad():
        for parameter, value in zip(network.parameters(), initial, strict=bool(initial)):
            parameter.lerp_(value, config.start_share)
    if checkpoint and rank() == 0:
        write_weights(checkpoint, network.state_dict(), iteration=config.iterations, history=history)
    optimizer.zero_grad()
    release_freed_memory()
    return history


def _step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    loss: Callable[[Batch], dict[str, Tensor]],
    runtime: Runtime,
    num_terms: Callable[[Batch], Tensor] | None,
) -> Losses:
    """Take one step; returns the losses of the whole batch."""
    batch = {name: field.to(runtime.device, non_blocking=True) for name, field in batch.items()}
    with runtime.autocast():
        losses = loss(batch)
    values = {name: value.detach() for name, value in losses.items()}
    if runtime.device.type == "cpu":
        _numbers([values])  # before a loss that is not finite ruins the weights
    terms = num_terms(batch) if num_terms else torch.tensor(len(batch["image"]), device=runtime.device)
    share = terms / sum_over_ranks(terms).clamp(min=1) if num_ranks() > 1 else 1.0
    optimizer.zero_grad(set_to_none=True)
    (torch.stack(list(losses.values())).sum() * share).backward()
    sum_gradients(network.parameters())
    optimizer.step()
    return {name: sum_over_ranks(value * share) for name, value in values.items()}


def _numbers(losses: Sequence[Losses]) -> list[dict[str, float]]:
    """The losses of some steps as numbers; waits for the device. FloatingPointError if one is not finite."""
    numbers = [{name: float(value) for name, value in step.items()} for step in losses]
    for step in numbers:
        if not all(map(math.isfinite, step.values())):
            raise FloatingPointError(f"the loss is no longer finite ({step}); lower the learning rate of this stage")
    return numbers


def check_batch_norm(network: nn.Module, number: int, device: torch.device) -> None:
    """Refuse batch norm that learns its statistics in several processes on a CPU: SyncBatchNorm needs GPUs."""
    learned = any(isinstance(layer, nn.BatchNorm2d) and layer.training for layer in network.train().modules())
    if learned and number > 1 and device.type == "cpu":
        advice = "set processes=1 (one process uses all cores), or model.freeze_batch_norm=true"
        raise ConfigError(f"batch norm cannot learn its statistics in several processes on a CPU; {advice}")


def make_optimizer(network: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """SGD or AdamW over four groups: backbone and new layers, each weights and biases.

    Source: rates x1, x2, x10, x20 and biases without weight decay, as in the reference code.
    """
    layers = network.new_layers() if callable(getattr(network, "new_layers", None)) else []  # type: ignore[operator]
    new = {id(parameter) for layer in layers for parameter in layer.parameters()}
    parameters: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            parameters.setdefault((id(parameter) in new, name.endswith("bias")), []).append(parameter)
    groups: list[dict[str, Any]] = []
    for is_new, is_bias in sorted(parameters):
        rate = config.learning_rate * (config.head_multiplier if is_new else 1.0)
        rate *= config.bias_multiplier if is_bias else 1.0
        decay = 0.0 if is_bias else config.weight_decay
        groups.append({"params": parameters[is_new, is_bias], "lr": rate, "weight_decay": decay})
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups)
    return torch.optim.SGD(groups, momentum=config.momentum)


def learning_rate(config: TrainingConfig, peak: float, iteration: int) -> float:
    """The learning rate of an iteration, from 0 on, in closed form: resuming needs no stored schedule.

    Source: ``poly`` as in DeepLab; ``onecycle`` as torch's OneCycleLR with its defaults: cosine from a 25th of the peak
    up over the first 30 %, then down to a 10,000th of that 25th.
    """
    if config.schedule == "poly":
        return peak * (1 - iteration / config.iterations) ** config.poly_power
    first, turn = peak / 25, 0.3 * (config.iterations + 1) - 1
    start, end, share = first, peak, iteration / turn
    if iteration > turn:
        start, end, share = peak, first / 1e4, (iteration - turn) / (config.iterations - turn)
    return end + (start - end) / 2.0 * (math.cos(math.pi * share) + 1)


def is_finished(checkpoint: Path, config: TrainingConfig) -> bool:
    """Whether a training has reached its last iteration."""
    return checkpoint.is_file() and _stored(checkpoint, "iteration", 0) >= config.iterations


def load_history(path: Path) -> History:
    """The learning curve stored beside a network's weights."""
    return _stored(path, "history", [])


def _stored(path: Path, name: str, default: Any) -> Any:
    return json.loads(read_metadata(path).get(name, "null")) or default


def _save_unfinished(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, **metadata: object) -> None:
    tensors = dict(network.state_dict())
    # The optimizer's state as plain tensors: a torch checkpoint would be a pickle.
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"{OPTIMIZER}{index}.{name}": value for name, value in slots.items() if value is not None}
    write_weights(path, tensors, **metadata)


def _resume(
    network: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path | None
) -> tuple[int, History, list[Losses]]:
    """Fill network and optimizer from a checkpoint: iterations done, history, losses since its last record."""
    if checkpoint is None or not checkpoint.is_file():
        return 0, [], []
    tensors = read_weights(checkpoint)
    fill(network, tensors, source=str(checkpoint))
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(OPTIMIZER):
            _, index, slot = name.split(".", 2)
            state.setdefault(int(index), {})[slot] = value
    if state:
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return _stored(checkpoint, "iteration", 0), load_history(checkpoint), _stored(checkpoint, "losses", [])


def _generator(*parts: object) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(*parts))
