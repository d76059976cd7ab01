"""Attention of a vision transformer's class token, which tells where it looks, not for which class.

``vit``: the last block's. ``vit-rollout``: of all blocks, multiplied (Abnar and Zuidema, "Quantifying Attention Flow in
Transformers", ACL 2020). ``dino``: the heads of a network that learned without labels (Caron et al., "Emerging
Properties in Self-Supervised Vision Transformers", ICCV 2021). Each also gives the affinity of patches.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from smaflib.config import AttentionConfig
from smaflib.data.transforms import IMAGENET_MEAN, IMAGENET_STD, renormalization
from smaflib.errors import ConfigError
from smaflib.models.weights import timm_model
from smaflib.sources import Attention, AttentionSource, Classes
from smaflib.sources.caa import AFFINITY_BLOCKS

MODELS = {
    "vit": "deit_small_patch16_224",
    "vit-rollout": "deit_small_patch16_224",
    "dino": "vit_small_patch16_224.dino",
}


class VitSource(AttentionSource):
    """One map for all classes that are asked for.

    Args:
        model: a plain vision transformer of timm, made with ``dynamic_img_size=True``; ConfigError for others.
        rollout: over all blocks instead of the last one.
        head: number of the head of the last block; None: the mean over heads.
    """

    needs_classes = True

    def __init__(
        self, model: Any, num_classes: int, rollout: bool, head: int | None = None, supervision: str = "ImageNet labels"
    ) -> None:
        super().__init__()
        name = type(model).__name__
        if not hasattr(model, "blocks") or not getattr(model, "num_prefix_tokens", 0):
            raise ConfigError(f"{name} is no vision transformer with a class token; take a ViT or DeiT of timm")
        self.model, self.num_classes, self.rollout, self.head = model, num_classes, rollout, head
        self.supervision, self.patch = supervision, model.patch_embed.patch_size[0]
        facts: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
        self._renormalization = renormalization(facts.get("mean", IMAGENET_MEAN), facts.get("std", IMAGENET_STD))
        for block in model.blocks:
            block.attn.fused_attn = False  # a fused kernel does not tell its attention

    def attentions(self, images: Tensor) -> list[Tensor]:
        """Attention of each block, (B, L, L) as the mean over heads; (B, heads, L, L) of the last."""
        seen: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            seen.append(output if len(seen) == len(self.model.blocks) - 1 else output.mean(dim=1))

        scale, shift = (each.to(images.device) for each in self._renormalization)
        with ExitStack() as stack:
            for block in self.model.blocks:
                stack.enter_context(block.attn.attn_drop.register_forward_hook(keep))
            self.model.forward_features(images * scale + shift)
        return seen

    def attend(self, images: Tensor, classes: Classes) -> Attention:
        *earlier, heads = self.attentions(images)
        last, prefix = heads.mean(dim=1), self.model.num_prefix_tokens
        grid = [side // self.patch for side in images.shape[2:]]
        if self.rollout:
            flow = torch.eye(last.shape[1], device=last.device).expand_as(last)
            for attention in [*earlier, last]:
                flow = (attention @ flow + flow) / 2  # half of a token stays, by the residual connection
            seen = flow[:, 0, prefix:]
        else:
            seen = (last if self.head is None else heads[:, self.head])[:, 0, prefix:]
        seen = (seen / seen.amax(dim=1, keepdim=True)).view(len(images), *grid)
        maps = images.new_zeros(len(images), self.num_classes, *grid)
        for row, asked in enumerate(classes):
            maps[row, list(asked)] = seen[row]
        affinity = torch.stack([*earlier, last][-AFFINITY_BLOCKS:]).mean(dim=0)[:, prefix:, prefix:]
        return Attention(maps, affinity)


def make(attention: AttentionConfig, class_names: Sequence[str], network: nn.Module | None) -> VitSource:
    """Build the source with a model of timm; ConfigError if it cannot be built or filled."""
    options, source = attention.options, attention.source
    name, weights = (options.model or MODELS[source]).removeprefix("timm/"), options.weights or "pretrained"
    model = timm_model(name, weights, dynamic_img_size=True)
    supervision = "images alone" if "dino" in name else "ImageNet labels"
    return VitSource(model, len(class_names), source == "vit-rollout", options.head, supervision)
