"""The optimisation loop that classifier, student and segmentation network share.

What happens in an iteration depends on the seed and the iteration's number alone, so a killed run that resumes from
its checkpoint ends with the same weights as one that was never killed.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
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
from smaflib.processes import barrier, num_ranks, rank, sum_gradients, sum_over_ranks
from smaflib.runtime import Runtime, derive_seed, progress, release_freed_memory, seeded

Batch = dict[str, Tensor]
History = list[dict[str, float]]
"""One record per logged stretch: ``iteration`` and the mean of every loss since the record before."""

CropFields = Callable[[Sample, int, Crop], dict[str, Tensor]]
"""What a loss needs beside image and image label, cut with the same crop: (sample, its index, crop) -> fields."""

LOG_POINTS = 50


@dataclass(frozen=True)
class CropField:
    """A field of the batch that is cut out of one item per sample: a mask, or denoised maps.

    A class and not a closure, so that loader processes can be started where nothing is forked.

    Attributes:
        name: of the field.
        items: per sample (H, W) or (C, H, W); may be lazy.
        interpolation: of the resize.
        fill: value outside the image.
    """

    name: str
    items: Sequence[Tensor]
    interpolation: str = "bilinear"
    fill: float = 0

    def __call__(self, sample: Sample, index: int, crop: Crop) -> dict[str, Tensor]:
        return {self.name: crop.apply(self.items[index], self.interpolation, self.fill)}


@dataclass(frozen=True)
class CropFieldsTogether:
    """Several :class:`CropField` as one; their names differ."""

    fields: Sequence[CropField]

    def __call__(self, sample: Sample, index: int, crop: Crop) -> dict[str, Tensor]:
        return {name: cut for field in self.fields for name, cut in field(sample, index, crop).items()}


class Batches(Dataset[Batch]):
    """Batch number ``iteration`` of a training: drawn, cropped, normalised.

    Every pass over the samples is a fresh permutation; passes run on across batches, so that all batches are full.

    Args:
        samples: the training split.
        config: of the training.
        seed: decides all that is drawn.
        crop_fields: what a batch has beside image and image label.
        num_workers: loader processes.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        config: TrainingConfig,
        seed: int,
        crop_fields: CropFields | None = None,
        num_workers: int = 0,
    ) -> None:
        self.samples, self.config, self.seed = samples, config, seed
        self.crop_fields, self.num_workers = crop_fields, num_workers
        self.rank, self.num_ranks = 0, 1

    def of_this_process(self) -> Batches:
        """This process's part of each batch; the batches are the same for any number of processes."""
        own = copy.copy(self)
        own.rank, own.num_ranks = rank(), num_ranks()
        return own

    def __len__(self) -> int:
        return self.config.iterations

    def __getitem__(self, iteration: int) -> Batch:
        first = iteration * self.config.batch_size
        positions = range(first, first + self.config.batch_size)[self.rank :: self.num_ranks]
        drawn = [self._draw(position) for position in positions]
        return {name: torch.stack([item[name] for item in drawn]) for name in drawn[0]}

    def _draw(self, position: int) -> Batch:
        round_, place = divmod(position, len(self.samples))
        order = torch.randperm(len(self.samples), generator=_generator(self.seed, "order", round_))
        index = int(order[place])
        sample, generator = self.samples[index], _generator(self.seed, "crop", position)
        if self.config.whole_images:
            crop = whole_image(self._side(position // self.config.batch_size), self.config, generator)
        else:
            height, width = sample.image.shape[-2:]
            crop = draw_crop((height, width), self.config, generator)
        image = jitter_colors(crop.apply(sample.image, "bicubic"), self.config.color_jitter, generator)
        # The padding is 0 after normalisation (the mean colour), as in the reference, not black before it.
        batch = {"image": crop.zero_outside(normalize(image)), "image_label": sample.image_label}
        return batch | (self.crop_fields(sample, index, crop) if self.crop_fields else {})

    def _side(self, iteration: int) -> int:
        """Of the squares of a batch of whole images, which must all be of one size."""
        smallest, largest = self.config.resize_range
        return int(torch.randint(smallest, largest + 1, (), generator=_generator(self.seed, "side", iteration)))


def fit(
    network: nn.Module,
    batches: Batches,
    loss: Callable[[Batch], dict[str, Tensor]],
    runtime: Runtime,
    checkpoint: Path | None = None,
    desc: str = "training",
    num_terms: Callable[[Batch], Tensor] | None = None,
) -> History:
    """Optimise a network in place; ends in eval mode.

    Several processes (:mod:`smaflib.processes`) each take their part of every batch, and make the same steps as one.

    Args:
        network: what learns; its ``new_layers()``, if there are any, learn at ``head_multiplier`` times the rate.
        batches: what it learns from, and the settings of the optimisation.
        loss: from a batch on the runtime's device to named losses, which are summed.
        runtime: device and precision.
        checkpoint: a safetensors file, written every ``checkpoint_every`` iterations and at the end; training resumes
            from it, and is done if it is complete. With ``start_share``, the network must come as it started the first
            time.
        desc: name on the progress bar.
        num_terms: how many terms a batch's losses are a mean of, such as pixels that count; None: the same number for
            each image. With it the parts' means become the mean of the whole batch.

    Returns:
        The learning curve.

    Raises:
        FloatingPointError: if the loss is no longer finite. A GPU would wait for each loss that is read, so there they
            are read when they are logged: before a checkpoint, and after some steps more.
    """
    config, batches = batches.config, batches.of_this_process()
    runtime.place(network).train()
    check_batch_norm(network, num_ranks(), runtime.device)
    if num_ranks() > 1 and runtime.device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    optimizer = make_optimizer(network, config)
    started_from = [p.detach().clone() for p in network.parameters()] if config.start_share else []
    history, start = _resume(network, optimizer, checkpoint)
    barrier()  # before the first process writes the next checkpoint
    if start >= config.iterations:
        network.eval()
        return history
    peaks = [group["lr"] for group in optimizer.param_groups]
    loader = _loader(batches, start, runtime)
    losses: list[dict[str, Tensor]] = []  # since the last record
    log_every = max(1, config.iterations // LOG_POINTS)
    for iteration, batch in enumerate(progress(loader, total=len(loader), desc=desc), start=start):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = learning_rate(config, peak, iteration)
        with seeded(derive_seed(batches.seed, "dropout", iteration) + rank(), runtime.device):
            losses.append(_step(network, optimizer, batch, loss, runtime, num_terms or _num_images))
        done = iteration + 1
        if done % log_every == 0 or done == config.iterations:
            history.append({"iteration": float(done)} | _means(losses))
            losses = []
        # Checkpoints fall on log points, so that no half of a mean is lost.
        at_checkpoint = done < config.iterations and done % _rounded_up(config.checkpoint_every, log_every) == 0
        if checkpoint and rank() == 0 and at_checkpoint:
            _save(checkpoint, network, history, done, optimizer)
    network.eval()
    _keep_start(network, started_from, config.start_share)
    if checkpoint and rank() == 0:
        _save(checkpoint, network, history, config.iterations, None)
    barrier()  # until what was learned can be read
    optimizer.zero_grad()
    release_freed_memory()
    return history


def _loader(batches: Batches, start: int, runtime: Runtime) -> DataLoader[Batch]:
    """Every batch of a training from an iteration on: one pass, so that its workers live as long as the training."""
    return DataLoader(
        batches,
        batch_size=None,
        sampler=range(start, batches.config.iterations),
        num_workers=batches.num_workers,
        # Without one of its own it would draw its workers' seeds from the global generator.
        generator=torch.Generator(),
        pin_memory=runtime.device.type == "cuda",  # what lies in pinned memory is copied while the GPU computes
    )


def check_batch_norm(network: nn.Module, num_processes: int, device: torch.device) -> None:
    """Refuse to share a training on a CPU if it learns batch statistics, which torch synchronises on GPUs only.

    Raises:
        ConfigError: naming the cure.
    """
    learned = any(isinstance(layer, nn.BatchNorm2d) and layer.training for layer in network.train().modules())
    if learned and num_processes > 1 and device.type == "cpu":
        raise ConfigError(
            "batch norm cannot learn its statistics in several processes on a CPU; set processes=1 (one process uses "
            "all cores), or model.freeze_batch_norm=true"
        )


def make_optimizer(network: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """SGD or AdamW over four groups: backbone and new layers, each weights and biases.

    Source: rates x1, x2, x10, x20 and biases without weight decay, as in the reference code.
    """
    layers = network.new_layers() if callable(getattr(network, "new_layers", None)) else []  # type: ignore[operator]
    new = {id(parameter) for layer in layers for parameter in layer.parameters()}
    groups: list[dict[str, Any]] = []
    for is_new, layer_rate in ((False, 1.0), (True, config.head_multiplier)):
        for is_bias, rate in ((False, 1.0), (True, config.bias_multiplier)):
            parameters = [
                parameter
                for name, parameter in network.named_parameters()
                if parameter.requires_grad and (id(parameter) in new) == is_new and name.endswith("bias") == is_bias
            ]
            decay = 0.0 if is_bias else config.weight_decay
            if parameters:
                rate_here = config.learning_rate * layer_rate * rate
                groups.append({"params": parameters, "lr": rate_here, "weight_decay": decay})
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups)
    return torch.optim.SGD(groups, momentum=config.momentum)


def learning_rate(config: TrainingConfig, peak: float, iteration: int) -> float:
    """The learning rate of an iteration in closed form, so that a resumed training needs no stored schedule.

    Args:
        config: ``schedule``, ``iterations`` and ``poly_power``.
        peak: the highest rate of the schedule.
        iteration: from 0 on.

    Source: ``poly`` as in DeepLab; ``onecycle`` as torch's OneCycleLR with its defaults (cosine from a 25th of the peak
    up over the first 30 %, then down to a 10,000th of where it began).
    """
    if config.schedule == "poly":
        return peak * (1 - iteration / config.iterations) ** config.poly_power
    first, turn = peak / 25, 0.3 * (config.iterations + 1) - 1
    if iteration <= turn:
        return _cosine(first, peak, iteration / turn)
    return _cosine(peak, first / 1e4, (iteration - turn) / (config.iterations - turn))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2.0 * (math.cos(math.pi * share) + 1)


def is_finished(checkpoint: Path, config: TrainingConfig) -> bool:
    """Whether a training has reached its last iteration."""
    return (
        checkpoint.is_file() and int(json.loads(read_metadata(checkpoint).get("iteration", "0"))) >= config.iterations
    )


def load_history(path: Path) -> History:
    """The learning curve stored beside a network's weights."""
    return json.loads(read_metadata(path).get("history", "[]"))


def _step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    loss: Callable[[Batch], dict[str, Tensor]],
    runtime: Runtime,
    num_terms: Callable[[Batch], Tensor],
) -> dict[str, Tensor]:
    """One step; the losses, times the share that this process's part has in those of the whole batch."""
    batch = {name: field.to(runtime.device, non_blocking=True) for name, field in batch.items()}
    with runtime.autocast():
        losses = loss(batch)
    if not runtime.computes_behind:
        _refuse_not_finite({name: float(value.detach()) for name, value in losses.items()})
    optimizer.zero_grad(set_to_none=True)
    share = _share(batch, num_terms)
    (torch.stack(list(losses.values())).sum() * share).backward()
    sum_gradients(network.parameters())
    optimizer.step()
    return {name: value.detach() * share for name, value in losses.items()}


def _num_images(batch: Batch) -> Tensor:
    return torch.tensor(len(batch["image"]), device=batch["image"].device)


def _share(batch: Batch, num_terms: Callable[[Batch], Tensor]) -> Tensor | float:
    """The part that this process's terms are of those of all processes; 1 if it is alone, and nothing is counted."""
    if num_ranks() == 1:
        return 1.0
    terms = num_terms(batch)
    return (terms.double() / sum_over_ranks(terms).clamp(min=1)).float()


def _means(losses: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """The mean of each loss over some steps, of all processes together; waits for the device.

    Raises:
        FloatingPointError: if a loss of one of them is not finite.
    """
    names = list(losses[0])
    parts = torch.stack([torch.stack([step[name].float() for name in names]) for step in losses])
    table = sum_over_ranks(parts).tolist()
    for values in table:
        _refuse_not_finite(dict(zip(names, values, strict=True)))
    return {name: sum(column) / len(table) for name, column in zip(names, zip(*table, strict=True), strict=True)}


def _refuse_not_finite(values: dict[str, float]) -> None:
    if not all(map(math.isfinite, values.values())):
        raise FloatingPointError(f"the loss is no longer finite ({values}); lower the learning rate of this stage")


@torch.no_grad()
def _keep_start(network: nn.Module, started_from: Sequence[Tensor], share: float) -> None:
    """Move the weights back, a share of the way to where they started. Statistics of BatchNorm stay as they are."""
    if started_from:
        for parameter, at_start in zip(network.parameters(), started_from, strict=True):
            parameter.lerp_(at_start, share)


def _save(
    path: Path, network: nn.Module, history: History, iteration: int, optimizer: torch.optim.Optimizer | None
) -> None:
    tensors = dict(network.state_dict())
    if optimizer is not None:
        # The optimizer's state as plain tensors: a torch checkpoint would be a pickle.
        for index, slots in optimizer.state_dict()["state"].items():
            tensors |= {f"{OPTIMIZER}{index}.{name}": value for name, value in slots.items() if value is not None}
    write_weights(path, tensors, iteration=iteration, history=history)


def _resume(network: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path | None) -> tuple[History, int]:
    if checkpoint is None or not checkpoint.is_file():
        return [], 0
    tensors = read_weights(checkpoint)
    iteration = int(json.loads(read_metadata(checkpoint).get("iteration", "0")))
    fill(network, {k: v for k, v in tensors.items() if not k.startswith(OPTIMIZER)}, source=str(checkpoint))
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(OPTIMIZER):
            _, index, slot = name.split(".", 2)
            state.setdefault(int(index), {})[slot] = value
    if state:
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return load_history(checkpoint), iteration


def _generator(*parts: object) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(*parts))


def _rounded_up(value: int, step: int) -> int:
    return -(-value // step) * step
