"""The chain: a function per stage over a :class:`~smaflib.workspace.Workspace`, and :func:`attend` for a single image.

Every function is idempotent: it resumes unfinished work and only loads what is complete. Notebooks, ``smaf masks`` and
the explorer call these. A module that a later stage is the first to use is imported there, so that a change in it makes
no earlier stage run again (:mod:`smaflib.runs.stages`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from minidata.dataset import CLASS_NAMES
from smaflib.cams import fuse_cams, multi_scale_cams
from smaflib.classifier import train_classifier
from smaflib.config import AttentionConfig, Config, SelfTrainingConfig, Split, Variant
from smaflib.data import load_samples
from smaflib.data.classes import VOID_LABEL
from smaflib.data.masks import MaskFiles, save_mask
from smaflib.data.voc import SPLITS
from smaflib.errors import ConfigError, DataError, InputError
from smaflib.models.networks import AttentionNetwork, SegmentationNetwork
from smaflib.plugins import load_custom
from smaflib.processes import barrier, gather, missing_files, num_processes, part, run_in_processes
from smaflib.reactivation import denoise, reactivate
from smaflib.runtime import Runtime, make_runtime, seeded
from smaflib.sources import as_source, make_source
from smaflib.training import History, check_batch_norm, is_finished
from smaflib.workspace import Workspace

if TYPE_CHECKING:
    from smaflib.maps import AttentionMaps


class ImageMaps(NamedTuple):
    """One image's maps on their way to a target."""

    cams: list[Tensor]  # per scale (K, h_s, w_s), non-negative
    fused: Tensor  # (K, H, W) in [0, 1], each class peaks at 1
    denoised: Tensor  # (K, H, W) in [0, 1], absent classes are zero
    target: Tensor  # (K+1, H, W) in [0, 1], background first, the strongest score of each pixel is 1


def attend(
    network: nn.Module, image: Tensor, image_label: Tensor, attention: AttentionConfig, bg_score: float
) -> ImageMaps:
    """Stages 2 and 3 for a single image, uint8 (3, H, W), and its label, (K,) in {0, 1}: the straight path.

    ``network`` is a teacher, a student or a source (:meth:`~smaflib.workspace.Workspace.source`).
    """
    classes = image_label.nonzero()[:, 0].tolist()
    how = (attention.scales, attention.flip, Runtime(), classes, attention.caa, attention.correlation)
    cams = multi_scale_cams(network, image, *how)
    fused = fuse_cams(cams, (image.shape[-2], image.shape[-1]), attention.fusion, attention.scales)
    denoised = denoise(fused, image_label)
    return ImageMaps(cams, fused, denoised, reactivate(denoised, bg_score))


# ---------------------------------------------------------------------------------------------------- stage by stage


def train_teacher(work: Workspace) -> tuple[AttentionNetwork, History]:
    """Stage 1: the classifier."""
    config, samples, checkpoint = work.config, work.samples(), work.checkpoint("teacher")
    trained = config.classifier.checkpoint is None and config.classifier.solve_head is None
    if trained and not is_finished(checkpoint, config.classifier):
        run_in_processes(num_processes(config), train_teacher, replace(work))
    runtime = work.make_runtime()
    return train_classifier(
        samples, config.model, config.classifier, runtime, attention=config.attention, checkpoint=checkpoint
    )


def write_maps(work: Workspace, network: str, split: Split = "train") -> "AttentionMaps":
    """Stage 2: a network's attention maps of a split."""
    from smaflib.maps import ENDING, write_attention_maps

    config, samples, maps = work.config, work.samples(split), work.maps(network, split)
    if missing_files(maps.folder, samples.image_ids, ENDING):
        run_in_processes(num_processes(config), write_maps, replace(work), network, split)
        write_attention_maps(work.source(network), samples, maps.folder, config.attention, work.make_runtime())
    return maps


def train_student(
    work: Workspace, name: str = "student", teacher: str = "teacher", **changes: Any
) -> tuple[AttentionNetwork, History]:
    """Stage 4: train one student on one teacher's maps of the training split.

    The student starts from the teacher's weights. ``changes`` are settings of ``self_training`` for this student alone,
    such as ``fused=False`` for the control.
    """
    from smaflib.self_training import self_train

    config, checkpoint = work.config, work.checkpoint(name)
    settings = config.self_training.model_copy(update=changes)
    if not is_finished(checkpoint, settings):
        run_in_processes(num_processes(config), train_student, replace(work), name, teacher, **changes)
    runtime = work.make_runtime()
    targets = [] if is_finished(checkpoint, settings) else _targets(work, teacher, settings, runtime.device)
    return self_train(
        work.network(teacher), work.samples(), targets, settings, work.bg_score, runtime, checkpoint=checkpoint
    )


def _targets(work: Workspace, teacher: str, settings: SelfTrainingConfig, device: torch.device) -> Sequence[Tensor]:
    """A teacher's maps, or the masks that ``self_training.refine`` makes of them.

    A student of masks learns where its teacher's maps agree with the edges of the images, and from what a person has
    corrected. The masks are kept in memory, one byte per pixel.
    """
    from smaflib.maps import MaskMaps
    from smaflib.pseudo_masks import pseudo_masks

    config, samples = work.config, work.samples()
    scales = None if settings.fused else [config.attention.single_scale]
    cached, weight = config.data.cache and settings.refine == "none", settings.saliency_weight
    maps = work.denoised(teacher, samples, scales, denoise=settings.denoise, saliency_weight=weight, cached=cached)
    if settings.refine == "none":
        return maps
    refinement = config.pseudo_masks.model_copy(update={"refine": settings.refine})
    mine = part(range(len(samples)))
    masks = gather(list(pseudo_masks(samples, maps, work.bg_score, refinement, mine, device=device, desc="targets")))
    corrected, number_of = work.corrected(), {image_id: n for n, image_id in enumerate(samples.image_ids)}
    for image_id, mask in zip(corrected.image_ids, corrected.ground_truth or (), strict=True):
        masks[number_of[image_id]] = mask.where(mask != VOID_LABEL, masks[number_of[image_id]])
    return MaskMaps(masks, len(samples.class_names))


def self_train_rounds(work: Workspace) -> dict[str, History]:
    """Stage 4, learning curves of all rounds: each student is the next round's teacher, the last one is ``student``."""
    histories, teacher, rounds = {}, "teacher", work.config.self_training.rounds
    for number in range(1, rounds + 1):
        name = "student" if number == rounds else f"student_round{number}"
        _, histories[name] = train_student(work, name, teacher)
        write_maps(work, name)
        teacher = name
    return histories


def write_masks(
    work: Workspace, network: str = "student", folder: str = "masks", bg_scores: Mapping[str, float] | None = None
) -> MaskFiles:
    """Stage 5: the pseudo masks of the training split, from a network's maps.

    ``bg_scores`` are background thresholds of single images by id, instead of the network's.
    """
    from smaflib.pseudo_masks import write_pseudo_masks

    config, samples = work.config, work.samples()
    bg_score, own = work.mask_bg_score(network), bg_scores or {}
    if missing_files(work.path(folder), samples.image_ids):
        run_in_processes(num_processes(config), write_masks, replace(work), network, folder, bg_scores)
        maps, device = work.mask_maps(network, samples), work.make_runtime().device
        thresholds = [own.get(image_id, bg_score) for image_id in samples.image_ids]
        write_pseudo_masks(samples, maps, work.path(folder), thresholds, config.pseudo_masks, device=device)
    barrier()  # every process has written its masks
    return work.masks(samples, folder)


def train_segmentation(work: Workspace) -> tuple[SegmentationNetwork, History]:
    """Stage 6: the segmentation network, trained on the pseudo masks, or on the ground truth as upper bound."""
    from smaflib.segmentation import train_segmenter

    config, samples, checkpoint = work.config, work.samples(), work.checkpoint("segmenter")
    settings = config.segmentation
    if settings.supervision == "ground_truth":
        samples = samples.annotated
        masks = samples.ground_truth
        if masks is None:
            raise DataError("segmentation.supervision=ground_truth needs masks of the training split; set data.masks")
    else:
        masks = work.masks(samples)
    if not is_finished(checkpoint, settings):
        run_in_processes(num_processes(config), train_segmentation, replace(work))
    student = work.network("student") if settings.initial_weights == "student" else None
    runtime = work.make_runtime()
    return train_segmenter(samples, masks, config.model, settings, runtime, student=student, checkpoint=checkpoint)


def write_segmentation(work: Workspace, split: Split = "val") -> MaskFiles:
    """Stage 6: the segmentation network's masks of a split, as palette PNGs; processes share the images."""
    from smaflib.segmentation import segment_many

    config, samples, folder = work.config, work.samples(split), work.path("masks_segmenter")
    if missing := missing_files(folder, samples.image_ids):
        run_in_processes(num_processes(config), write_segmentation, replace(work), split)
        missing = missing_files(folder, samples.image_ids)
        network, runtime = work.segmenter(), work.make_runtime()
        masks = segment_many(network, samples, config.segmentation, runtime, missing, f"segment {split}")
        for index, mask in zip(missing, masks, strict=True):
            save_mask(folder / f"{samples.image_ids[index]}.png", samples.at_full_size(index, mask))
    barrier()  # every process has written its masks
    return work.masks(samples, "masks_segmenter")


# -------------------------------------------------------------------------------------------------------- evaluation


def evaluate_network(
    work: Workspace,
    network: str,
    variant: Variant,
    *,
    scales: Sequence[float] | None = None,
    rule: str | None = None,
    denoise: bool = True,
    bg_score: float | None = None,
    splits: Sequence[Split] = ("train", "val"),
) -> tuple[list[dict[str, Any]], float | None]:
    """Tidy records of a network's maps on the images that have ground truth, and the background threshold.

    ``iou_sweep`` is the mIoU at every threshold of ``evaluation.thresholds``. Scales and rule are as in
    :meth:`~smaflib.workspace.Workspace.denoised`; records of a single scale name it, others the rule. Without
    ``bg_score`` it is the oracle, which has the highest mIoU of the first split, for all splits.
    """
    from smaflib.evaluation import sweep_thresholds

    where: dict[str, Any] = {"variant": variant, "fusion": rule or work.config.attention.fusion}
    if scales is not None and len(scales) == 1:
        where = {"variant": variant, "scale": scales[0]}
    records: list[dict[str, Any]] = []
    for split in splits:
        samples, config = work.samples(split).annotated, work.config.evaluation
        if samples.ground_truth is None:
            continue
        if bg_score is not None:
            config = config.model_copy(update={"thresholds": (*config.thresholds, bg_score)})
        maps, here = work.denoised(network, samples, scales, rule, denoise=denoise), {"split": split} | where
        sweep = sweep_thresholds(maps, samples.ground_truth, samples.class_names, config)
        if bg_score is None:
            bg_score = max(sweep, key=lambda threshold: sweep[threshold].miou)
        records += sweep[bg_score].records(bg_score=bg_score, **here)
        swept = here | {"metric": "iou_sweep", "class_name": "mean"}
        records += [swept | {"bg_score": threshold, "value": scores.miou} for threshold, scores in sweep.items()]
    return records, bg_score


# --------------------------------------------------------------------------------------------- checks before a run


def check_config(config: Config, run_folder: Path, networks: bool = True) -> None:
    """Find what a run needs before it writes anything: custom code, networks, the files of both splits.

    InputError says what does not fit. Custom images are also read: there are few, and nobody has checked them.
    """
    check_custom(config)
    splits = SPLITS if config.data.kind != "mini" else ()  # which is drawn
    found = [load_samples(config, split, run_folder) for split in splits]
    if networks:
        check_networks(config, found[0].class_names if found else CLASS_NAMES)
    for samples in found if config.data.kind == "folder" else ():
        samples.check_images()


def check_networks(config: Config, class_names: Sequence[str] = CLASS_NAMES) -> None:
    """Build the networks that a chain will train, and the source of attention.

    ConfigError if a backbone, its stride, its weights, or device and precision are not available, a file of weights
    is damaged or of another network, or the source does not know the classes.
    """
    device, number = make_runtime(config).device, num_processes(config)
    given, settings = config.classifier.checkpoint, config.segmentation
    model = config.model.model_copy(update={"weights": None}) if given else config.model
    network = AttentionNetwork(model, num_classes=1, background=True)
    check_batch_norm(network, number, device)
    if settings.enabled:
        segmenter = SegmentationNetwork(settings.model or config.model, settings, num_classes=1)
        check_batch_norm(segmenter, number, device)
    if config.attention.source != "classifier":
        make_source(config.attention, class_names, None if config.attention.pretrained else network)
    elif config.attention.correlation is not None:
        as_source(network).features(torch.zeros(1, 3, 64, 64))


def check_custom(config: Config) -> None:
    """Call the custom code of a config once on tiny inputs; ConfigError with setting, name and cause."""
    for setting, name in config.custom_code.items():
        try:
            with seeded(0), torch.no_grad():
                _try_custom(config, setting, name)
        except Exception as error:
            cause = error if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            raise ConfigError(f"{setting}: {name} failed on a tiny input: {cause}") from error


def _try_custom(config: Config, setting: str, name: str) -> None:
    if setting == "data.kind":
        load_samples(config, "train")  # which reads the first sample
        load_samples(config, "val")
    elif setting == "attention.fusion":
        rule, scales, maps = load_custom(name), torch.tensor([0.5, 1.0, 2.0]), torch.rand(3, 2, 16, 12)
        maps[:, 1] = 0  # a class without attention
        fused = _check_maps(rule(maps, scales), (2, 16, 12))
        if not torch.allclose(rule(maps[:, :1], scales), fused[:1], atol=1e-4):
            raise ValueError("a class is fused differently without the others; each must be fused independently")
    elif setting.endswith("refine"):
        image = torch.randint(0, 256, (3, 24, 20), dtype=torch.uint8)
        _check_maps(load_custom(name)(image, torch.rand(3, 24, 20)), (3, 24, 20))
    else:  # a backbone or a source of maps
        model = (config.segmentation.model if setting.startswith("segmentation") else config.model) or config.model
        network = AttentionNetwork(model.model_copy(update={"weights": None}), 2, background=True).eval()
        own = setting == "attention.source"
        source = make_source(config.attention, ("a", "b"), network) if own else as_source(network)
        with torch.set_grad_enabled(source.needs_gradients):
            maps = source.attend(torch.randn(2, 3, 64, 96), [[0, 1]] * 2).maps
        _check_maps(maps.detach(), (2, 2, None, None))


def _check_maps(maps: Tensor, shape: tuple[int | None, ...]) -> Tensor:
    if len(maps.shape) != len(shape) or any(n not in (None, m) for n, m in zip(shape, maps.shape, strict=True)):
        raise ValueError(f"it returned the shape {tuple(maps.shape)}, not {shape}")
    if not maps.is_floating_point() or not bool((maps.isfinite() & (maps >= 0)).all()):
        raise ValueError("it returned values that are not finite and non-negative floats")
    return maps
