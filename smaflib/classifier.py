"""Stage 1: learn from image labels which classes an image shows; the logit maps then tell where.

*Plain* training compares the spatial mean of each class's logit map with the image label. *EPS* (Lee et al.,
"Railroad is not a Train", CVPR 2021) also makes the maps explain a saliency map, which teaches them object borders.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smaflib.config import AttentionConfig, ClassifierConfig, Config, HeadSolverConfig, ModelConfig
from smaflib.data.sample import Sample, Samples
from smaflib.data.transforms import Crop
from smaflib.data.views import load_views
from smaflib.models.networks import AttentionNetwork, SegmentationNetwork, load_attention_network
from smaflib.models.weights import fill, read_weights, write_weights
from smaflib.runtime import Runtime, derive_seed, device_of, progress, seeded
from smaflib.training import Batch, Batches, History, fit, load_history


def train_classifier(
    samples: Samples,
    model: ModelConfig,
    settings: ClassifierConfig,
    runtime: Runtime,
    *,
    attention: AttentionConfig = AttentionConfig(),
    checkpoint: Path | None = None,
) -> tuple[AttentionNetwork, History]:
    """Train the teacher from image labels, and with ``pretraining: eps`` from saliency maps too.

    Args:
        samples: the training split; masks are not read.
        attention: scales and flip of the views for ``settings.solve_head``.
        checkpoint: file of the weights; an unfinished training resumes from it.

    Returns the network in eval mode and its learning curve.
    """
    num_classes = len(samples.class_names)
    eps, random = settings.pretraining == "eps", attention.pretrained and not settings.solve_head
    if settings.checkpoint is not None:
        network = load_attention_network(settings.checkpoint, model, num_classes)
    else:
        # EPS needs a background map, and so does a random head from which a student starts.
        with seeded(derive_seed(runtime.seed, "initial weights")):
            network = AttentionNetwork(model, num_classes, background=eps or random)
    network.to(runtime.device)
    if settings.checkpoint is not None or random:  # nothing to train
        if checkpoint:
            write_weights(checkpoint, network.state_dict(), iteration=settings.iterations, history=[])
        return network.eval(), []
    if settings.solve_head is not None:
        return network, solve_head(network, samples, settings.solve_head, attention, runtime, checkpoint)
    samples, fields = (samples.with_saliency(), crop_saliency) if eps else (samples, None)
    batches = Batches(samples, settings, derive_seed(runtime.seed, "classifier"), fields)
    if model.freeze_backbone and not (checkpoint and checkpoint.is_file()):
        standardize_features(network, batches, runtime)

    def loss(batch: Batch) -> dict[str, Tensor]:
        logits = network(batch["image"])
        losses = {"L_cls": classification_loss(network.image_logits(logits), batch["image_label"])}
        if eps:
            losses["L_sal"] = saliency_loss(logits, batch["saliency"], batch["image_label"], settings)
        return losses

    return network, fit(network, batches, loss, runtime, checkpoint, stage="classifier")


def classification_loss(image_logits: Tensor, image_label: Tensor) -> Tensor:
    """L_cls, the multi-label soft margin loss: (B, K) logits and (B, K) labels in {0, 1} to a scalar.

    Example:
        >>> f"{classification_loss(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])):.4f}"
        '0.6931'
    """
    return F.multilabel_soft_margin_loss(image_logits, image_label)


def saliency_loss(logits: Tensor, saliency: Tensor, image_label: Tensor, config: ClassifierConfig) -> Tensor:
    r"""L_sal of EPS: foreground and inverted background maps together must explain the saliency map.

    A labelled class is foreground if more than ``eps_tau`` of its area is salient, else background. Classes without
    label belong to neither.

    Args:
        logits: (B, K+1, h, w), background first.
        saliency: (B, H, W) in [0, 1]; resized (nearest) to h x w.
        image_label: (B, K) in {0, 1}.

    Source: equations 2 to 5 of EPS; the constants inside follow the reference code.
    """
    saliency = F.interpolate(saliency[:, None], size=logits.shape[2:])[:, 0]  # (B, h, w), nearest
    probabilities = logits.softmax(dim=1)  # (B, K+1, h, w)
    background, classes = probabilities[:, 0], probabilities[:, 1:]
    rounded = classes.round()
    overlap = (rounded * saliency.round()[:, None]).sum(dim=(2, 3)) / (rounded + 1e-4).sum(dim=(2, 3))  # (B, K)
    labelled = image_label > 0
    is_foreground = (labelled & (overlap > config.eps_tau))[..., None, None]
    # Only labelled classes that fail the test join the background; classes without label join neither.
    is_background = (labelled & (overlap <= config.eps_tau))[..., None, None]
    foreground = (classes * is_foreground).sum(dim=1)
    background = background + (classes * is_background).sum(dim=1)
    estimate = config.eps_lambda * foreground + (1 - config.eps_lambda) * (1 - background)
    return F.mse_loss(estimate, saliency)


def fill_standardize(
    network: AttentionNetwork | SegmentationNetwork, features: Iterable[Tensor]
) -> tuple[Tensor, Tensor]:
    """Mean and variance per channel, float64 (C,), of features (B, C, h, w), for the ``standardize`` layer."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for batch in features:
        count += batch.numel() // batch.shape[1]
        total = total + batch.sum(dim=(0, 2, 3))
        squares = squares + batch.square().sum(dim=(0, 2, 3))
    mean = total / count
    variance = (squares / count - mean.square()).clamp(min=0)
    network.standardize.load_state_dict({"running_mean": mean, "running_var": variance}, strict=False)
    return mean, variance


@torch.no_grad()
def standardize_features(network: AttentionNetwork | SegmentationNetwork, batches: Batches, runtime: Runtime) -> None:
    """Measure mean and variance of a frozen backbone's features, once, over the first two passes of a training.

    Crops and not whole images, since features depend on the size at which objects are shown: a mean measured at
    another size leaves every image the same offset, which the head uses as a bias, and the maps lose their zero point.
    """
    network.to(runtime.device).eval()
    num_batches = min(len(batches), math.ceil(2 * len(batches.samples) / batches.config.batch_size))
    loader = batches.loader(range(num_batches), runtime)
    crops = (batch["image"].to(runtime.device) for batch in progress(loader, num_batches, "feature statistics"))
    fill_standardize(network, (network.backbone(images).double().cpu() for images in crops))


def solve_head(
    network: AttentionNetwork,
    samples: Samples,
    settings: HeadSolverConfig,
    attention: AttentionConfig,
    runtime: Runtime,
    checkpoint: Path | None = None,
) -> History:
    """Compute the last layer on a frozen backbone: a logistic regression on each image's mean feature.

    A linear layer commutes with the spatial mean, so an image at one scale is one vector, and the loss is convex in the
    layer's weights: L-BFGS finds its minimum, where training could stop short of it. The images are whole, at every
    scale of ``attention`` and mirrored: the views of :func:`~smaflib.cams.multi_scale_cams`. The loss is L_cls plus
    ``weight_decay`` times the squared weights of a class, averaged over the classes.

    The plain teacher's ``standardize`` layer and head are filled in place; a ``checkpoint`` that exists is only loaded.
    """
    runtime.place(network).eval()
    if checkpoint and checkpoint.is_file():
        fill(network, read_weights(checkpoint), source=str(checkpoint))
        return load_history(checkpoint)
    pooled, labels = _mean_features(network, samples, attention, runtime)  # (N, C), (N, K)
    weights = torch.zeros(labels.shape[1], pooled.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=settings.iterations, line_search_fn="strong_wolfe")
    history: History = []

    def closure() -> float:
        optimizer.zero_grad()
        loss = classification_loss(pooled @ weights.T, labels)
        penalty = settings.weight_decay * weights.square().sum(dim=1).mean()
        (loss + penalty).backward()
        history.append({"iteration": float(len(history) + 1), "L_cls": loss.item(), "penalty": penalty.item()})
        return (loss + penalty).item()

    optimizer.step(closure)
    with torch.no_grad():
        network.head.weight.copy_(weights[:, :, None, None])
    if checkpoint:
        write_weights(checkpoint, network.state_dict(), history=history)
    return history


@torch.no_grad()
def _mean_features(
    network: AttentionNetwork, samples: Samples, attention: AttentionConfig, runtime: Runtime
) -> tuple[Tensor, Tensor]:
    """Standardised features, float64: means over each image at each scale and mirrored (N, C), labels (N, K)."""
    means, labels, image_labels = list[Tensor](), list[Tensor](), samples.image_labels.double()

    def features() -> Iterator[Tensor]:
        for batch in load_views(samples, attention.scales, runtime, desc="features"):
            for images in batch.views:
                views = torch.cat([images, images.flip(-1)]) if attention.flip else images
                with runtime.autocast():
                    seen = network.backbone(views).double().cpu()  # (B or 2B, C, h, w)
                means.append(seen.mean(dim=(2, 3)))
                labels.append(image_labels[batch.indices].repeat(len(views) // len(images), 1))
                yield seen

    mean, variance = fill_standardize(network, features())
    deviation = (variance + network.standardize.eps).sqrt()  # type: ignore[operator]
    return (torch.cat(means) - mean) / deviation, torch.cat(labels)


ONE_VIEW = AttentionConfig(scales=(1.0,), flip=False)


@torch.no_grad()
def classify(
    network: AttentionNetwork,
    samples: Sequence[Sample],
    runtime: Runtime,
    views: AttentionConfig = ONE_VIEW,
    desc: str = "classify",
) -> Tensor:
    """The network's image logits, averaged over views: float32 (N, K)."""
    network.to(runtime.device).eval()
    means = []
    for batch in load_views(samples, views.scales, runtime, desc=desc):
        rows = []
        for images in batch.views:
            with runtime.autocast():
                logits = network(torch.cat([images, images.flip(-1)]) if views.flip else images)
                rows.append(network.image_logits(logits).float())  # (B or 2B, K)
        means.append(torch.cat(rows).cpu().unflatten(0, (-1, len(batch.images))).mean(dim=0))
    return torch.cat(means)


def predict_label(network: AttentionNetwork, image: Tensor, config: Config) -> Tensor:
    """An image, uint8 (3, H, W), to its label (K,): classes with a logit above 0, or the likeliest one.

    A head that was computed (:func:`solve_head`) sees the views that it was computed from: it finds far too many
    classes in an image of another size.
    """
    views = config.attention if config.classifier.solve_head else ONE_VIEW
    samples, runtime = [Sample("image", image, torch.zeros(0))], Runtime(device_of(network))
    (logits,) = classify(network, samples, runtime, views, desc="")
    return ((logits > 0) | (logits == logits.max())).float()


def crop_saliency(sample: Sample, index: int, crop: Crop) -> dict[str, Tensor]:
    """The saliency map as a field of the batch."""
    assert sample.saliency is not None  # train_classifier has checked the whole split
    return {"saliency": crop.apply(sample.saliency)}


def classification_scores(
    image_logits: Tensor, image_labels: Tensor, class_names: Sequence[str]
) -> list[dict[str, Any]]:
    """Precision and recall per class of "logit above 0", their means, and the share of images with all labels right.

    From logits and labels (N, K) to records with class_name, metric and value; nan: the precision of a class never
    predicted, the recall of an absent one.
    """
    found, there = image_logits > 0, image_labels > 0
    hits = (found & there).sum(dim=0).double()
    records = []
    for metric, values in (("precision", hits / found.sum(dim=0)), ("recall", hits / there.sum(dim=0))):
        every = dict(zip(class_names, values.tolist(), strict=True)) | {"mean": float(values.nanmean())}
        records += [{"class_name": name, "metric": metric, "value": value} for name, value in every.items()]
    exact = float((found == there).all(dim=1).double().mean())
    return [*records, {"class_name": "mean", "metric": "accuracy", "value": exact}]
