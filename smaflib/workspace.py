"""The folder that a chain works in: its settings, networks, maps and masks by name.

``smaf status`` opens one without torch: what needs torch is imported by the method that returns it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smaflib import files
from smaflib.config import Config, Split

if TYPE_CHECKING:
    from smaflib.data.masks import MaskFiles
    from smaflib.data.sample import Samples
    from smaflib.maps import AttentionMaps, FusedMaps
    from smaflib.models.networks import AttentionNetwork, SegmentationNetwork
    from smaflib.runtime import Runtime
    from smaflib.sources import AttentionSource


@dataclass(frozen=True)
class Workspace:
    """A folder and the settings of everything in it.

    The folder contains ``checkpoints/``, ``cams/``, ``bg_scores/``, ``masks/``, ``masks_segmenter/``, and generated
    data in ``data/``. ``leave_out``: ids of images that do not take part.
    """

    folder: Path
    config: Config
    leave_out: frozenset[str] = field(default=frozenset(), kw_only=True)
    _samples: dict[Split, Samples] = field(default_factory=dict, init=False, repr=False, compare=False)

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath(*parts)

    def checkpoint(self, network: str) -> Path:
        """The weights of ``teacher``, ``student``, ``student_control``, ``segmenter``, ..."""
        return self.path("checkpoints", f"{network}.safetensors")

    def samples(self, split: Split = "train") -> Samples:
        """The images and image labels of a split, without masks; DataError if the data cannot be used."""
        if split not in self._samples:
            from smaflib.data import load_samples

            samples = load_samples(self.config, split, self.folder)
            if self.leave_out:
                ids = samples.image_ids
                samples = samples.subset([n for n, image_id in enumerate(ids) if image_id not in self.leave_out])
            known: dict[str, dict[str, Any]] = files.read_json(self.path("data.json"), {})
            unusable = "unusable" in known.get(split, {})
            self._samples[split] = samples.without_ground_truth() if unusable else samples
        return self._samples[split]

    def make_runtime(self) -> Runtime:
        """Device, precision and seed of the config; sets torch's threads."""
        from smaflib.runtime import make_runtime

        return make_runtime(self.config)

    def network(self, name: str) -> AttentionNetwork:
        """A teacher or student from its checkpoint, in eval mode on the CPU; ConfigError if the file cannot be read."""
        from smaflib.models.networks import load_attention_network

        return load_attention_network(self.checkpoint(name), self.config.model, len(self.samples().class_names))

    def source(self, name: str) -> AttentionSource:
        """Where the maps of ``teacher``, ``student``, ... come from; ConfigError as in :func:`make_source`."""
        from smaflib.sources import as_source, make_source

        attention, teacher = self.config.attention, name == "teacher"
        if attention.own_student and not teacher:
            return as_source(self.network(name))
        network = None if attention.pretrained or self.untrained else self.network(name)
        return make_source(attention, self.samples().class_names, network)

    @property
    def untrained(self) -> bool:
        """Whether ImageNet's classifier maps all classes, so that no trained network takes part."""
        attention = self.config.attention
        if attention.source != "imagenet+classifier":
            return False
        from smaflib.sources.imagenet import match_classes

        return all(match_classes(self.samples().class_names, attention.options.class_numbers).values())

    def segmenter(self) -> SegmentationNetwork:
        """The segmentation network from its checkpoint, in eval mode on the CPU; ConfigError if it cannot be read."""
        from smaflib.models.networks import SegmentationNetwork
        from smaflib.models.weights import fill, read_weights

        settings, path = self.config.segmentation, self.checkpoint("segmenter")
        model = (settings.model or self.config.model).model_copy(update={"weights": None})
        network = SegmentationNetwork(model, settings, len(self.samples().class_names))
        fill(network, read_weights(path), source=str(path))
        return network.eval()

    def maps(self, network: str, split: Split = "train") -> AttentionMaps:
        """A network's attention maps of a split, per scale, which :func:`smaflib.pipeline.write_maps` writes."""
        from smaflib.maps import AttentionMaps

        folder = network if split == "train" else f"{network}_{split}"
        return AttentionMaps(self.path("cams", folder), self.config.attention.scales)

    def denoised(
        self,
        network: str,
        samples: Samples,
        scales: Sequence[float] | None = None,
        rule: str | None = None,
        saliency_weight: float = 0.0,
        **options: Any,
    ) -> FusedMaps:
        """A network's maps of some samples of a split, fused and denoised when read.

        ``scales`` are those to fuse, by default all; a single one is taken as it is. The fusion rule is by default the
        config's, ``saliency_weight`` the share of the samples' saliency maps, if there are any. ``options`` are those
        of :class:`~smaflib.maps.FusedMaps`, such as ``denoise=False``.
        """
        from smaflib.maps import FusedMaps

        rule = rule or ("sum" if scales is not None and len(scales) == 1 else self.config.attention.fusion)
        maps = self.maps(network, "train" if samples.split == "train" else "val")
        weight = saliency_weight if any(each.saliency for each in samples.files) else 0.0
        return FusedMaps(maps, samples, rule, scales, saliency_weight=weight, **options)

    def mask_maps(self, network: str, samples: Samples, scales: Sequence[float] | None = None) -> FusedMaps:
        """The maps that become pseudo masks: :meth:`denoised`, with ``pseudo_masks.saliency_weight``."""
        return self.denoised(network, samples, scales, saliency_weight=self.config.pseudo_masks.saliency_weight)

    def masks(self, samples: Samples, folder: str = "masks") -> MaskFiles:
        """The pseudo masks of some samples in their order, or those of another folder; DataError if one is missing."""
        from smaflib.data.masks import MaskFiles

        return MaskFiles([self.path(folder, f"{image_id}.png") for image_id in samples.image_ids], samples.longest_side)

    def corrected(self) -> Samples:
        """The images with a mask from a person's hand, ``corrected/<image_id>.png``, as their ground truth."""
        from smaflib.data.voc import list_pngs

        samples, folder = self.samples(), self.path("corrected")
        masks = list_pngs(folder, "") if folder.is_dir() else {}
        listed = (replace(each, mask=masks.get(each.image_id)) for each in samples.files)
        return replace(samples, files=tuple(listed)).annotated

    @property
    def bg_score(self) -> float:
        """Background threshold of the targets, ``attention.bg_score``; ``auto`` chooses it from the teacher's maps.

        What was chosen is stored. Saliency maps take part in the choice where the teacher has learned from them.
        """
        score = self.config.attention.bg_score
        return self._choose("teacher", self.denoised("teacher", self.samples())) if score == "auto" else score

    def mask_bg_score(self, network: str = "student", scales: Sequence[float] | None = None) -> float:
        """Background threshold of a network's pseudo masks: ``pseudo_masks.bg_score``, else ``attention.bg_score``.

        ``auto`` chooses it from the network's maps, of all scales or some, as in :attr:`bg_score`.
        """
        score = self.config.pseudo_masks.bg_score or self.config.attention.bg_score
        name = "_".join(["teacher_masks" if network == "teacher" else network, *(f"{s:g}" for s in scales or ())])
        return self._choose(name, self.mask_maps(network, self.samples(), scales)) if score == "auto" else score

    def _choose(self, name: str, maps: FusedMaps) -> float:
        from smaflib.maps import SaliencyMaps
        from smaflib.thresholds import choose_bg_score

        stored = self.path("bg_scores", f"{name}.json")
        known = files.read_json(stored, {})
        if not known:
            eps = self.config.classifier.pretraining == "eps"
            known = {"bg_score": choose_bg_score(maps, SaliencyMaps(self.samples()) if eps else None)}
            files.write_json(stored, known)
        return known["bg_score"]
