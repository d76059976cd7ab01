"""The chain: a function per stage over a folder, and :func:`attend` for a single image.

Every function is idempotent: it resumes what is unfinished and only loads what is complete. Notebooks, ``smaf masks``,
the ablation and the explorer call these. Each imports its stage's modules inside, so importing this module imports no
torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from smaflib import files
from smaflib.config import Config, Split
from smaflib.errors import MissingStage
from smaflib.plugins import DATA

if TYPE_CHECKING:
    from torch import Tensor, nn

    from smaflib.config import AttentionConfig, FusionRule, SelfTrainingConfig, Variant
    from smaflib.data.masks import MaskFiles
    from smaflib.data.sample import Samples
    from smaflib.maps import AttentionMaps, FusedMaps
    from smaflib.models.networks import AttentionNetwork, SegmentationNetwork
    from smaflib.runtime import Runtime
    from smaflib.training import History


@dataclass(frozen=True)
class Workspace:
    """The folder that a chain works in: its settings, and where each network, map and mask lies.

    Attributes:
        folder: takes ``checkpoints/``, ``cams/``, ``bg_scores/``, ``masks/`` and ``masks_segmenter/``.
        config: all settings.
        data_home: whose folder ``data`` takes data that code makes; None: its own.
    """

    folder: Path
    config: Config
    data_home: Path | None = field(default=None, kw_only=True)

    def path(self, *parts: str) -> Path:
        """A path inside the folder."""
        return self.folder.joinpath(*parts)

    def checkpoint(self, network: str) -> Path:
        """Where the weights of ``teacher``, ``student``, ``student_control``, ``segmenter``, ... lie."""
        return self.path("checkpoints", f"{network}.safetensors")

    def maps(self, network: str, split: Split = "train") -> AttentionMaps:
        """A network's attention maps of a split, per scale; :func:`write_maps` makes them."""
        from smaflib.maps import AttentionMaps

        folder = network if split == "train" else f"{network}_{split}"
        return AttentionMaps(self.path("cams", folder), self.config.attention.scales)

    def denoised(
        self,
        network: str,
        samples: Samples,
        scales: Sequence[float] | None = None,
        rule: FusionRule | None = None,
        denoised: bool = True,
        saliency_weight: float = 0.0,
    ) -> FusedMaps:
        """A network's maps of some samples, fused and denoised, read when asked for.

        Args:
            network: whose maps.
            samples: of one split, all or some.
            scales: which take part; None: all.
            rule: of the fusion; None: the config's, and the sum for a single scale, where there is nothing to fuse.
            denoised: False leaves the maps of absent classes in.
            saliency_weight: share of the samples' saliency maps, for targets and masks.
        """
        from smaflib.maps import FusedMaps

        rule = rule or ("sum" if scales is not None and len(scales) == 1 else self.config.attention.fusion)
        maps = self.maps(network, _split(samples))
        return FusedMaps(maps, samples, rule, scales, denoise=denoised, saliency_weight=saliency_weight)

    def mask_maps(self, network: str, samples: Samples, scales: Sequence[float] | None = None) -> FusedMaps:
        """The maps that become pseudo masks: as of :meth:`denoised`, with ``pseudo_masks.saliency_weight``."""
        return self.denoised(network, samples, scales, saliency_weight=self.config.mask_saliency_weight)

    def masks(self, samples: Samples, folder: str = "masks") -> MaskFiles:
        """The masks of some samples, in their order: pseudo masks, or those of another folder of the run.

        Raises:
            DataError: if one is missing.
        """
        from smaflib.data.masks import MaskFiles

        return MaskFiles([self.path(folder, f"{image_id}.png") for image_id in samples.image_ids])

    def samples(self, split: Split = "train") -> Samples:
        """The images and image labels of a split, without masks; read once.

        Raises:
            DataError: if the data cannot be used.
        """
        if split not in self._samples:
            from smaflib.data import load_samples

            self._samples[split] = load_samples(self.config, split, self.data_folder)
        return self._samples[split]

    @cached_property
    def _samples(self) -> dict[str, Samples]:
        return {}

    @property
    def data_folder(self) -> Path:
        """Where data that code makes lies, in its folder ``data``."""
        return self.data_home or self.folder

    def make_runtime(self) -> Runtime:
        """Choose device, precision and seed as the config says, and set torch's threads."""
        from smaflib.runtime import make_runtime

        return make_runtime(self.config)

    def network(self, name: str) -> AttentionNetwork:
        """A teacher or student from its checkpoint, in eval mode on the CPU.

        Raises:
            ConfigError: if the file is missing or damaged.
        """
        from smaflib.models.networks import load_attention_network

        return load_attention_network(self.checkpoint(name), self.config.model, len(self.samples().class_names))

    def segmenter(self) -> SegmentationNetwork:
        """The segmentation network from its checkpoint, in eval mode on the CPU.

        Raises:
            ConfigError: if the file is missing or damaged.
        """
        from smaflib.models.networks import load_segmentation_network

        model, settings = self.config.model, self.config.segmentation
        num_classes = len(self.samples().class_names)
        return load_segmentation_network(self.checkpoint("segmenter"), model, settings, num_classes)

    @property
    def bg_score(self) -> float:
        """The background's score: ``attention.bg_score``, or where that is ``auto``, the one that stage 03 resolved.

        Raises:
            MissingStage: if it is ``auto`` and not resolved yet.
        """
        score = self.config.attention.bg_score
        if score != "auto":
            return score
        stored = self.path("bg_scores", "teacher.json")
        resolved = read_bg_score(stored)
        if resolved is None:
            raise MissingStage(f"attention.bg_score is 'auto' and {stored} is missing; stage 03 resolves it")
        return resolved


def _split(samples: Samples) -> Split:
    return "train" if samples.split == "train" else "val"


# --------------------------------------------------------------------------------------------------- a single image


@dataclass(frozen=True)
class ImageMaps:
    """One image's maps on their way to a target.

    Attributes:
        cams: per scale (K, h_s, w_s), non-negative.
        fused: (K, H, W) in [0, 1], each class peaks at 1.
        denoised: (K, H, W) in [0, 1], absent classes are zero.
        target: (K+1, H, W) in [0, 1], background first, the strongest score of each pixel is 1.
    """

    cams: list[Tensor]
    fused: Tensor
    denoised: Tensor
    target: Tensor


def attend(
    network: nn.Module,
    image: Tensor,
    image_label: Tensor,
    attention: AttentionConfig,
    bg_score: float,
    runtime: Runtime | None = None,
) -> ImageMaps:
    """Stages 2 and 3 for a single image: the straight path, line by line.

    Args:
        network: teacher, student or any module with ``attention``.
        image: uint8 (3, H, W).
        image_label: (K,) in {0, 1}.
        attention: scales, flip, source of maps and fusion rule.
        bg_score: the background's score.
        runtime: precision; None: float32.
    """
    from smaflib.cams import fuse_cams, multi_scale_cams, source_of
    from smaflib.reactivation import denoise, reactivate

    cams = multi_scale_cams(source_of(network, attention.source), image, attention.scales, attention.flip, runtime)
    fused = fuse_cams(cams, (image.shape[-2], image.shape[-1]), attention.fusion, attention.scales)
    denoised = denoise(fused, image_label)
    return ImageMaps(cams, fused, denoised, reactivate(denoised, bg_score))


# ----------------------------------------------------------------------------------------------------- stage by stage


def check_plugins(config: Config) -> None:
    """Try what a config names of somebody's own on tiny inputs, so that what is wrong shows before hours of work.

    Raises:
        PluginError: naming setting, code, what it did and what it must do.
    """
    if config.plugins:
        from smaflib.trials import try_plugins

        try_plugins(config)


def check_networks(config: Config) -> None:
    """Build the networks that a chain will train, once, so that what is wrong with them shows before hours of work.

    Raises:
        ConfigError: if a backbone, its stride, its weights or the device and precision are not available.
        ConfigError: if a file of weights is missing, damaged or of another network.
    """
    from smaflib.models.networks import AttentionNetwork, SegmentationNetwork
    from smaflib.processes import num_processes
    from smaflib.runtime import make_runtime
    from smaflib.training import check_batch_norm

    device, number = make_runtime(config).device, num_processes(config)
    if config.classifier.checkpoint is None:
        check_batch_norm(AttentionNetwork(config.model, num_classes=1, background=True), number, device)
    if config.segmentation.enabled:
        settings = config.segmentation
        check_batch_norm(SegmentationNetwork(settings.model or config.model, settings, num_classes=1), number, device)


def _share_work(work: Workspace, function: str, is_done: Callable[[], bool], **arguments: Any) -> None:
    """Let several processes do a function's work first, where ``processes`` asks for them (:mod:`smaflib.processes`).

    The function then finds all of it done. In a process that is one of several, nothing happens.

    Args:
        work: the folder that all of them work in.
        function: the name of the function of this module that calls this one.
        is_done: whether there is nothing left to do; asked only where processes would be started.
        arguments: of that function.
    """
    from smaflib.processes import num_processes, num_ranks, run_in_processes

    number = num_processes(work.config)
    if number > 1 and num_ranks() == 1 and not is_done():
        run_in_processes(number, _take_part, replace(work), function, **arguments)


def _take_part(work: Workspace, function: str, **arguments: Any) -> None:
    globals()[function](work, **arguments)


def are_there(folder: Path, samples: Samples, ending: str = ".png") -> bool:
    """Whether every image has its file in a folder."""
    names = [f"{image_id}{ending}" for image_id in samples.image_ids]
    return len(files.names_there(folder, names)) == len(set(names))


def train_teacher(work: Workspace) -> tuple[AttentionNetwork, History]:
    """Stage 1: the classifier.

    Raises:
        ConfigError: if EPS is asked for and not every image has a saliency map.
        DataError: if saliency maps are of another size than their images.
    """
    from smaflib.classifier import train_classifier
    from smaflib.data.voc import check_saliency_sizes
    from smaflib.training import is_finished

    config = work.config
    if config.classifier.pretraining == "eps" and not DATA.is_own(config.data.kind):  # which may keep no pictures
        check_saliency_sizes(work.samples())
    if config.classifier.checkpoint is None and config.classifier.solve_head is None:
        _share_work(work, "train_teacher", lambda: is_finished(work.checkpoint("teacher"), config.classifier))
    return train_classifier(
        work.samples(),
        config.model,
        config.classifier,
        work.make_runtime(),
        attention=config.attention,
        checkpoint=work.checkpoint("teacher"),
        num_workers=config.data.num_workers,
    )


def write_maps(work: Workspace, network: str, split: Split = "train") -> AttentionMaps:
    """Stage 2: a network's attention maps of a split."""
    from smaflib.cams import source_of
    from smaflib.maps import write_attention_maps

    maps, samples = work.maps(network, split), work.samples(split)
    if are_there(maps.folder, samples, ".npz"):
        return maps
    _share_work(work, "write_maps", lambda: False, network=network, split=split)
    attention = work.config.attention
    source = source_of(work.network(network), attention.source)
    return write_attention_maps(source, samples, maps.folder, attention, work.make_runtime())


def resolve_bg_score(work: Workspace) -> float:
    """Choose the background's score of the targets, where the config says ``auto``, and store it.

    The teacher's maps decide, without saliency maps in them.
    """
    samples = work.samples()
    return _resolve(work, "teacher", work.config.attention.bg_score, work.denoised("teacher", samples), samples)


def resolve_mask_bg_score(work: Workspace, network: str = "student") -> float:
    """Choose the background's score of a network's masks, where the config says ``auto``, and store it.

    It is ``pseudo_masks.bg_score``, or where that is null, ``attention.bg_score``. Each network has its own.
    """
    samples, stored = work.samples(), "teacher_masks" if network == "teacher" else network
    return _resolve(work, stored, work.config.mask_bg_score, work.mask_maps(network, samples), samples)


def _resolve(work: Workspace, name: str, score: float | Literal["auto"], maps: FusedMaps, samples: Samples) -> float:
    stored = work.path("bg_scores", f"{name}.json")
    if score == "auto":
        kept = read_bg_score(stored)
        score = auto_bg_score(work, maps, samples) if kept is None else kept
    files.write_json(stored, {"bg_score": score})
    return score


def read_bg_score(path: Path) -> float | None:
    """The background's score that was resolved and stored; None where it was not.

    Raises:
        RunError: if the file is damaged.
    """
    from smaflib.config import BgScore

    score = files.read_json(path, {}, dict[Literal["bg_score"], BgScore]).get("bg_score")
    return None if score is None else float(score)


def auto_bg_score(work: Workspace, denoised: Sequence[Tensor], samples: Samples) -> float:
    """What ``bg_score: auto`` means for some maps: saliency maps decide if the teacher has learned from them.

    Args:
        work: says what the teacher learns from.
        denoised: of the samples, in their order.
        samples: of the training split.
    """
    from smaflib.maps import SaliencyMaps
    from smaflib.thresholds import choose_bg_score

    return choose_bg_score(denoised, SaliencyMaps(samples) if work.config.classifier.pretraining == "eps" else None)


def train_student(
    work: Workspace, name: str = "student", teacher: str = "teacher", **changes: Any
) -> tuple[AttentionNetwork, History]:
    """Stage 4: train one student on one teacher's maps of the training split.

    Args:
        work: holds the teacher's checkpoint and maps, and takes the student's checkpoint.
        name: of the student.
        teacher: whose maps are learned, and whose weights the student starts from.
        changes: settings of ``self_training`` for this student alone, such as ``fused=False`` for the control.
    """
    from smaflib.self_training import self_train
    from smaflib.training import is_finished

    config, samples, runtime = work.config, work.samples(), work.make_runtime()
    settings = config.self_training.model_copy(update=changes)

    def is_done() -> bool:
        return is_finished(work.checkpoint(name), settings)

    _share_work(work, "train_student", is_done, name=name, teacher=teacher, **changes)
    return self_train(
        work.network(teacher),
        samples,
        [] if is_done() else _targets(work, teacher, settings, runtime),  # minutes of CRF, for nothing
        settings,
        work.bg_score,
        runtime,
        checkpoint=work.checkpoint(name),
        num_workers=config.data.num_workers,
    )


def _targets(work: Workspace, teacher: str, settings: SelfTrainingConfig, runtime: Runtime) -> Sequence[Tensor]:
    """The denoised maps, or the masks that ``self_training.refine`` makes of them.

    A student of masks learns where its teacher's maps agree with the edges of the images. The masks are kept in memory,
    one byte per pixel.
    """
    from torch.utils.data import Subset

    from smaflib.maps import MaskMaps
    from smaflib.processes import gather, part
    from smaflib.pseudo_masks import pseudo_masks

    config, samples = work.config, work.samples()
    scales = None if settings.fused else [config.attention.single_scale]
    weight = config.target_saliency_weight
    maps = work.denoised(teacher, samples, scales, denoised=settings.denoise, saliency_weight=weight)
    if settings.refine == "none":
        maps.cached = config.data.cache  # a refinement reads each once
        return maps
    refinement = config.pseudo_masks.model_copy(update={"refine": settings.refine})
    numbers = part(range(len(samples)))
    some: Any = Subset(maps, numbers)  # type: ignore[arg-type]
    own = samples.subset(numbers)
    masks = pseudo_masks(own, some, work.bg_score, refinement, device=runtime.device, desc="targets")
    return MaskMaps(gather(list(masks)), len(samples.class_names))


def self_train_rounds(work: Workspace) -> dict[str, History]:
    """Stage 4, all rounds: each student is the next round's teacher; the last one is ``student``.

    Returns:
        The learning curve of each round.
    """
    histories, teacher, rounds = {}, "teacher", work.config.self_training.rounds
    for number in range(1, rounds + 1):
        name = "student" if number == rounds else f"student_round{number}"
        _, histories[name] = train_student(work, name, teacher)
        write_maps(work, name)
        teacher = name
    return histories


def write_masks(work: Workspace, network: str = "student") -> MaskFiles:
    """Stage 5: the pseudo masks of the training split, from a network's maps."""
    from smaflib.pseudo_masks import write_pseudo_masks

    samples, bg_score = work.samples(), resolve_mask_bg_score(work, network)
    _share_work(work, "write_masks", lambda: are_there(work.path("masks"), samples), network=network)
    write_pseudo_masks(
        samples,
        work.mask_maps(network, samples),
        work.path("masks"),
        bg_score,
        work.config.pseudo_masks,
        device=work.make_runtime().device,
    )
    return work.masks(samples)


def train_segmentation(work: Workspace) -> tuple[SegmentationNetwork, History]:
    """Stage 6: the segmentation network, trained on the pseudo masks, or on the ground truth as upper bound."""
    from smaflib.segmentation import train_segmenter
    from smaflib.training import is_finished

    config, samples = work.config, work.samples()
    settings = config.segmentation
    masks: Sequence[Tensor] | None
    if settings.supervision == "ground_truth":
        samples = samples.annotated
        masks = samples.ground_truth
    else:
        masks = work.masks(samples)
    _share_work(work, "train_segmentation", lambda: is_finished(work.checkpoint("segmenter"), settings))
    return train_segmenter(
        samples,
        masks or [],
        config.model,
        settings,
        work.make_runtime(),
        student=work.network("student") if settings.initial_weights == "student" else None,
        checkpoint=work.checkpoint("segmenter"),
        num_workers=config.data.num_workers,
    )


def write_segmentation(work: Workspace, split: Split = "val") -> MaskFiles:
    """Stage 6: the segmentation network's masks of a split."""
    from smaflib import segmentation

    samples = work.samples(split)
    masks = work.path("masks_segmenter")
    _share_work(work, "write_segmentation", lambda: are_there(masks, samples), split=split)
    segmentation.write_segmentation(work.segmenter(), samples, masks, work.config.segmentation, work.make_runtime())
    return work.masks(samples, "masks_segmenter")


# --------------------------------------------------------------------------------------------------------- evaluation


def evaluate_network(
    work: Workspace,
    network: str,
    variant: Variant,
    *,
    scales: Sequence[float] | None = None,
    rule: FusionRule | None = None,
    denoised: bool = True,
    bg_score: float | None = None,
    splits: Sequence[Split] = ("train", "val"),
) -> tuple[list[dict[str, Any]], float | None]:
    """Evaluate a network's maps on the images that have ground truth.

    Args:
        work: holds the maps.
        network: whose maps.
        variant: the name of the records.
        scales: which take part; None: all. Records of a single one name it, others the rule.
        rule: as of :meth:`Workspace.denoised`.
        denoised: False leaves the maps of absent classes in.
        bg_score: the background's score; None: the oracle threshold of the first split, for all splits.
        splits: which have maps.

    Returns:
        Tidy records for ``Run.record``, none where there is no ground truth; the background score.
    """
    from smaflib.evaluation import evaluate_maps

    single = scales is not None and len(scales) == 1
    fused_by = rule or work.config.attention.fusion
    where: dict[str, Any] = {"variant": variant} | ({"scale": scales[0]} if scales and single else {"fusion": fused_by})
    records = []
    for split in splits:
        samples = work.samples(split).annotated
        found, chosen = evaluate_maps(
            work.denoised(network, samples, scales, rule, denoised),
            samples.ground_truth,
            samples.class_names,
            work.config.evaluation,
            bg_score,
            split=split,
            **where,
        )
        records += found
        bg_score = bg_score if chosen is None else chosen  # a split without ground truth chooses nothing
    return records, bg_score
