"""Code of somebody's own, tried on tiny inputs before a run starts: a wrong shape shows in seconds, not after hours.

:func:`try_plugins` is called by every command that computes, through :func:`smaflib.pipeline.check_plugins`. Each later
call is checked too, but for what would take time.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from smaflib.cams import fuse_cams, source_of
from smaflib.config import AttentionConfig, Config, DataConfig, ModelConfig
from smaflib.data import load_custom_data
from smaflib.errors import PluginError
from smaflib.models.networks import AttentionNetwork
from smaflib.plugins import BACKBONE, DATA, FUSION, REFINEMENT, SOURCE, calling, checked_maps, load
from smaflib.runtime import derive_seed, seeded

SAME = 1e-4
"""Largest difference between maps in [0, 1] that counts as none."""


def try_plugins(config: Config) -> None:
    """Load and call everything that a config names of somebody's own.

    Raises:
        PluginError: naming setting, code, what it did and what it must do.
    """
    named = config.plugins
    for kind, name in named.values():
        load(kind, name)  # all of them first: what is not there shows at once
    with seeded(derive_seed("trial")):
        if FUSION.setting in named:
            _try_fusion(config.attention)
        for refinement in sorted({name for kind, name in named.values() if kind.group == REFINEMENT.group}):
            _try_refinement(refinement)
        for model in (config.model, config.segmentation.model):
            if model is not None and BACKBONE.is_own(model.backbone):
                _try_backbone(model)
        if SOURCE.setting in named:
            _try_source(config.model, config.attention.source)
    if DATA.setting in named:
        _try_data(config.data)


def _maps(*shape: int) -> Tensor:
    """Random maps in [0, 1], the last class zero all over: rules that divide by a peak must stand that."""
    maps = torch.rand(shape)
    maps[..., -1, :, :] = 0
    return maps


def _try_fusion(attention: AttentionConfig) -> None:
    """All scales, and one alone; and each class must come out as it does beside others."""
    rule, size = attention.fusion, (18, 14)
    cams = [_maps(3, 9, 7) for _ in attention.scales]
    fused = fuse_cams(cams, size, rule, attention.scales)
    fuse_cams(cams[:1], size, rule, attention.scales[:1])
    for classes in ([0], [1, 2]):
        alone = fuse_cams([cam[classes] for cam in cams], size, rule, attention.scales)
        if float((alone - fused[classes]).abs().max()) > SAME:
            raise PluginError(
                f"the fusion rule {rule} gives a class another map when other classes are left out; it must join each "
                "class by itself, since only the classes of the image label are fused"
            )


def _try_refinement(name: str) -> None:
    scores = torch.cat([torch.full((1, 24, 20), 0.4), _maps(2, 24, 20)])
    what, image = f"the refinement {name}", torch.randint(0, 256, (3, 24, 20), dtype=torch.uint8)
    with calling(what), torch.no_grad():
        checked_maps(what, load(REFINEMENT, name)(image, scores), tuple(scores.shape), "(K+1, H, W)")


def _try_backbone(model: ModelConfig) -> None:
    """Two images that are no square; copies must be possible, since a student is one of its teacher."""
    # Its initial weights are read by check_networks, once.
    network = AttentionNetwork(model.model_copy(update={"weights": None}), num_classes=2, background=True)
    what = f"the backbone {model.backbone}"
    if not list(network.backbone.parameters()):
        raise PluginError(f"{what} has no weights; it must be an nn.Module with parameters")
    images = torch.randn(2, 3, 96, 128)
    with calling(what), torch.no_grad():
        features = copy.deepcopy(network).eval().backbone(images)
    if not bool(features.isfinite().all()):
        raise PluginError(f"{what} gave features that are not finite, for images of random numbers")


def _try_source(model: ModelConfig, name: str) -> None:
    """A network with a background map, as of a student, and without, as of a plain teacher."""
    for background in (True, False):
        network = AttentionNetwork(model.model_copy(update={"weights": None}), 2, background).eval()
        with torch.no_grad():
            source_of(network, name).eval()(torch.randn(2, 3, 64, 96))


def _try_data(data: DataConfig) -> None:
    """Both splits, and the first image of each with its mask where there is one."""
    names = {}
    for samples in (load_custom_data(data, "train"), load_custom_data(data, "val")):
        names[samples.split] = samples.class_names
        first = samples[:1]
        for sample in first.with_ground_truth() if first.has_ground_truth else first:
            assert sample.image_id
    if names["train"] != names["val"]:
        raise PluginError(f"the data set {data.kind} has other classes in 'val' than in 'train': {names}")
